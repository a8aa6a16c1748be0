"""Strict YAML: text in, one validated pydantic model out, every refusal with its line.

It owns the reading of the documents that people write for this package: boards and simulated
nodes. It never touches the file system except through `read_document`, never follows YAML aliases
(they can blow a small file up) and never builds anything but plain values. The invariant: whatever
it returns was checked key by key, and whatever it refuses names the line to mend.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from partitioner.errors import DocumentError

MAX_DOCUMENT_BYTES = 1 << 20
MAX_DOCUMENT_DEPTH = 32
MAX_REPORTED_PROBLEMS = 5
_TOO_DEEP = f"nests deeper than {MAX_DOCUMENT_DEPTH} levels"

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """The safe loader, without anchors and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases (& and *) are not allowed here"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class StrictModel(BaseModel):
    """Frozen, and unknown keys are refused: a typo must not pass for a setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=StrictModel)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the closest known name, or nothing when none is close."""
    close = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_document(path: Path) -> str:
    """Read a document of at most `MAX_DOCUMENT_BYTES`; raises `DocumentError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            raise DocumentError(str(path), 0, f"is larger than {MAX_DOCUMENT_BYTES} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise DocumentError(str(path), 0, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DocumentError(str(path), 0, f"is not UTF-8 at byte {error.start}") from error


def parse(model: type[Model], text: str, source: str) -> Model:
    """Validate `text` as `model`; `source` is what messages call the document.

    Raises `DocumentError` at the first line that must change; further problems follow in the text.
    """
    return parse_located(model, text, source)[0]


def parse_located(
    model: type[Model], text: str, source: str
) -> tuple[Model, Mapping[KeyPath, int]]:
    """Like `parse`, and also return the line of every key path, for checks that come later."""
    lines: dict[KeyPath, int] = {}
    try:
        root = yaml.compose(text, Loader=_Loader)
        values = None if root is None else _Reader(source, lines).plain(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"is not valid YAML: {error.problem or error.context}"
        raise DocumentError(source, mark.line + 1 if mark else 0, problem) from error
    except yaml.YAMLError as error:
        raise DocumentError(source, 0, f"is not valid YAML: {error}") from error
    except RecursionError as error:
        raise DocumentError(source, 0, _TOO_DEEP) from error
    if not isinstance(values, dict):
        raise DocumentError(source, 0, "must be a mapping of keys to values")
    try:
        return model.model_validate(values), lines
    except ValidationError as error:
        raise _refusal(error, model, lines, source) from error


class _Reader:
    """Turns YAML nodes into plain values and notes the line on which each path starts."""

    def __init__(self, source: str, lines: dict[KeyPath, int]) -> None:
        self._source = source
        self._lines = lines
        self._scalars = yaml.constructor.SafeConstructor()

    def plain(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        if len(path) > MAX_DOCUMENT_DEPTH:
            raise DocumentError(self._source, line, _TOO_DEEP)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, index)) for index, item in enumerate(node.value)]
        try:
            return self._scalars.construct_object(node)
        except ValueError as error:  # For example a date with a thirteenth month.
            problem = f"{node.value!r} is not a value: {error}"
            raise DocumentError(self._source, line, problem) from error

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise DocumentError(self._source, line, "a key must be a plain name")
            key = str(key_node.value)
            if key in mapping:
                raise DocumentError(self._source, line, f"the key {key!r} is given twice")
            self._lines[(*path, key)] = line
            mapping[key] = self.plain(value_node, (*path, key))
        return mapping


def _refusal(
    error: ValidationError, model: type[StrictModel], lines: dict[KeyPath, int], source: str
) -> DocumentError:
    """Rewrite pydantic's findings as one error: the first problem's line, and a bounded list."""
    schema = model.model_json_schema()
    known = set(schema.get("properties", ()))
    for definition in schema.get("$defs", {}).values():
        known.update(definition.get("properties", ()))
    found: list[tuple[int, str]] = []
    problems = error.errors(include_url=False, include_context=False)
    for item in problems:
        location: KeyPath = item["loc"]
        if item["type"] == "too_short" and any(
            len(other["loc"]) > len(location) and other["loc"][: len(location)] == location
            for other in problems
        ):
            continue  # A list is short only because its items were refused.
        name = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            key = str(location[-1])
            text = f"unknown key {key!r}{nearest(key, known)}"
        elif item["type"] == "missing":
            text = f"the key {name!r} is missing"
        else:
            text = f"{name or 'the document'}: {item['msg'].removeprefix('Value error, ')}"
        while location and location not in lines:
            location = location[:-1]
        found.append((lines.get(location, 0), text))
    found.sort(key=lambda problem: problem[0])
    first_line, first = found[0]
    rest = [f"line {line}: {text}" for line, text in found[1:MAX_REPORTED_PROBLEMS]]
    return DocumentError(source, first_line, "; ".join([first, *rest]))
