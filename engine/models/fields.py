"""Strict reading of a JSON configuration file.

Owns the rule that a field is either of the stated type and range or an error that names file and
field: nothing is coerced, and null counts as absent, which is how published configurations use it.
It never knows what a field means.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointInvalid

FILE_BYTES_MAX = 4 << 20
"""Published configurations are a few kilobytes; more is not one."""


INTEGER_MAX = 1 << 40
"""No size or count of a model comes near; what is computed from one must fit a message."""


class Fields:
    """The fields of one JSON object, read by name; errors name the file and the field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    @classmethod
    def from_file(cls, path: Path) -> Fields:
        """Read a JSON object. Raises CheckpointInvalid for any other content."""
        try:
            with path.open("rb") as file:
                content = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise CheckpointInvalid(
                f"{path} cannot be read ({error.strerror}); a checkpoint needs it", file=path.name
            ) from error
        if len(content) > FILE_BYTES_MAX:
            raise CheckpointInvalid(
                f"{path} is larger than {FILE_BYTES_MAX} bytes, so it is no configuration",
                file=path.name,
            )
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CheckpointInvalid(f"{path} is not JSON: {error}", file=path.name) from error
        if not isinstance(values, dict):
            raise CheckpointInvalid(f"{path} holds no JSON object", file=path.name)
        return cls(values, path.name)

    def invalid(self, name: str, why: str) -> CheckpointInvalid:
        """The error for one field."""
        shown = repr(self.values.get(name))
        return CheckpointInvalid(
            f"{self.where}: {name} is {shown[:80]}; {why}", file=self.where, field=name
        )

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; required when there is no default."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.invalid(name, f"it must be a whole number of at least {minimum}")
        if value > INTEGER_MAX:
            raise self.invalid(name, f"it must be at most {INTEGER_MAX}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero; required when there is no default."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.invalid(name, "it must be a number above 0")
        # A whole number of JSON may be beyond every float.
        if not 0 < value <= sys.float_info.max:
            raise self.invalid(name, "it must be a finite number above 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.invalid(name, "it must be true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.invalid(name, "it must be a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty when absent."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.invalid(name, "it must be a list of strings")
        return tuple(value)

    def token_ids(self, name: str, vocabulary: int) -> tuple[int, ...]:
        """One token id or a list of them, each inside the vocabulary; empty when absent."""
        value = self.values.get(name)
        if value is None:
            return ()
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            known = isinstance(entry, int) and not isinstance(entry, bool)
            if not known or not 0 <= entry < vocabulary:
                raise self.invalid(name, f"it must hold token ids from 0 to {vocabulary - 1}")
        return tuple(dict.fromkeys(entries))

    def object(self, name: str) -> Fields:
        """A nested object; empty when absent."""
        value = self.values.get(name)
        if value is None:
            return Fields({}, f"{self.where}: {name}")
        if not isinstance(value, dict):
            raise self.invalid(name, "it must be an object")
        return Fields(value, f"{self.where}: {name}")
