"""The text the example models are trained on, found where every Debian and Python leaves it.

This module owns where the text lies, how it is cut into documents and passages, and in which order
they come. It never downloads, never imports the modules it reads (docstrings come from their syntax
trees), and never draws a random number: on one installation the corpus is the same every time.

A document is a whole text, for plain continuation. Its passages are the parts of it that make a
good answer in a conversation, each with the subject that a person would name to get it. `repeats`
says how many times a document, with its passages, enters the training text.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LICENCES = Path("/usr/share/common-licenses")
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])

# Tests, generated tables and programs' assets: code, but not code anybody reads.
SKIPPED_FOLDERS = {
    *("__pycache__", "ensurepip", "encodings", "idlelib", "lib2to3", "lib-dynload", "pydoc_data"),
    *("site-packages", "dist-packages", "test", "tests", "turtledemo"),
}
SKIPPED_FILES = re.compile(r"^(_sysconfigdata.*|.*_test|test_.*|__phello__.*)\.py$|config-")

PASSAGE_LIMIT_CHARS = 1400
PASSAGE_FLOOR_CHARS = 120
HELD_OUT_ONE_IN = 40

# Docstrings are most of the prose, but licences and manuals are what a reader knows at sight.
LICENCE_REPEATS = 4
TOPIC_REPEATS = 2

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class CorpusError(Exception):
    """No text was found where this kind of corpus should lie."""


@dataclass(frozen=True, slots=True)
class Passage:
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    text: str
    passages: tuple[Passage, ...]
    repeats: int = 1

    @property
    def held_out(self) -> bool:
        """Whether this document is kept from training, to measure on. Decided by its name alone."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def documents(kind: str) -> tuple[Document, ...]:
    """Every document of a kind (`prose` or `code`), ordered by name."""
    found = {"prose": _prose, "code": _code}[kind]()
    ordered = tuple(sorted(found, key=lambda document: document.name))
    if not ordered:
        raise CorpusError(
            f"found no text for {kind!r} under {LICENCES} and {STANDARD_LIBRARY}: "
            "run this on a Debian with Python's standard library installed as source"
        )
    return ordered


def fingerprint(found: tuple[Document, ...]) -> str:
    """One hash over names and texts, to tell whether two installations hold the same corpus."""
    digest = hashlib.sha256()
    for document in found:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def _prose() -> Iterator[Document]:
    yield from _licences()
    yield from _topics()
    for path in _library_files():
        passages = tuple(_docstrings(path))
        if passages:
            text = "\n\n\n".join(passage.text for passage in passages)
            yield Document(f"docstrings/{_module(path)}", text, passages)


def _licences() -> Iterator[Document]:
    # GPL, LGPL and GFDL without a version are links to the latest one: they would count it twice.
    paths = [path for path in LICENCES.glob("*") if path.is_file() and not path.is_symlink()]
    for path in [*paths, STANDARD_LIBRARY / "LICENSE.txt"]:
        if path.is_file():
            text = _clean(path.read_bytes().decode("utf-8", "replace"))
            name = "PSF-2.0" if path.name == "LICENSE.txt" else path.name
            subject = f"the {name} license"
            passages = tuple(_paragraphs(subject, text))
            yield Document(f"licence/{name}", text, passages, LICENCE_REPEATS)


def _topics() -> Iterator[Document]:
    path = STANDARD_LIBRARY / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    tree = ast.parse(path.read_bytes())
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
    assert table is not None, "pydoc's topics are an assignment of one literal"
    for topic, raw in ast.literal_eval(table).items():
        text = _clean(raw)
        yield Document(f"topic/{topic}", text, tuple(_paragraphs(topic, text)), TOPIC_REPEATS)


def _code() -> Iterator[Document]:
    for path in _library_files():
        text = _clean(path.read_bytes().decode("utf-8", "replace"))
        if text:
            yield Document(f"source/{_module(path)}", text, tuple(_definitions(text)))


def _library_files() -> list[Path]:
    return [
        path
        for path in sorted(STANDARD_LIBRARY.rglob("*.py"))
        if not SKIPPED_FOLDERS & set(path.relative_to(STANDARD_LIBRARY).parts)
        and not any(SKIPPED_FILES.search(part) for part in path.relative_to(STANDARD_LIBRARY).parts)
    ]


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(STANDARD_LIBRARY).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _docstrings(path: Path) -> Iterator[Passage]:
    """Docstrings that are prose: long enough to say something, and without console sessions."""
    yield from _docstrings_below(ast.parse(path.read_bytes()), _module(path))


def _docstrings_below(
    node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str
) -> Iterator[Passage]:
    text = _clean(ast.get_docstring(node) or "")
    if len(text) >= PASSAGE_FLOOR_CHARS and ">>>" not in text:
        yield Passage(name, _cut(text))
    for child in node.body:
        if isinstance(child, Definition):
            yield from _docstrings_below(child, f"{name}.{child.name}")


def _definitions(text: str) -> Iterator[Passage]:
    """Functions, methods and small classes, each moved to the left margin."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Definition):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
            if PASSAGE_FLOOR_CHARS <= len(source) <= PASSAGE_LIMIT_CHARS:
                yield Passage(node.name, source)


def _paragraphs(subject: str, text: str) -> Iterator[Passage]:
    """Runs of whole paragraphs, each as long as a passage may be."""
    run: list[str] = []
    for paragraph in [*re.split(r"\n{2,}", text), None]:
        length = sum(map(len, run)) + 2 * len(run)
        if run and (paragraph is None or length + len(paragraph) > PASSAGE_LIMIT_CHARS):
            if length >= PASSAGE_FLOOR_CHARS:
                yield Passage(subject, _cut(textwrap.dedent("\n\n".join(run))))
            run = []
        if paragraph is not None:
            run.append(paragraph)


def _cut(text: str) -> str:
    """The text up to the last whole sentence or line that a passage has room for."""
    if len(text) <= PASSAGE_LIMIT_CHARS:
        return text
    head = text[:PASSAGE_LIMIT_CHARS]
    ends = [match.end() for match in re.finditer(r"[.:;]\n|\.\s|\n\n", head)]
    return head[: ends[-1]].rstrip() if ends else head


def _clean(text: str) -> str:
    """Line ends, tabs and form feeds as one would type them today; no space at a line's end."""
    text = text.replace("\r\n", "\n").replace("\f", "").expandtabs(8)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n")
