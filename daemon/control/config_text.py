"""A configuration as the text of a file.

It owns the writing alone; `config_file` reads. The invariant: reading what was written gives the
same.
"""

from __future__ import annotations

import json
from typing import Any

from daemon.control.config import Config


def as_toml(config: Config) -> str:
    """A configuration as the file that would give it, every key in its table."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            keys = [f"{key} = {_toml(value)}" for key, value in values.items()]
            lines += [f"[{section}]", *keys, ""]
        elif values:
            lines.insert(0, f"{section} = {json.dumps(values)}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """JSON's strings, numbers, booleans and keys are TOML's as well; its objects are not."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
        )
    return json.dumps(value)
