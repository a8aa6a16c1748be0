"""What an XID means and what is to be done about it: the table that ships as data.

It owns the reading and checking of `xids.yaml`. It never decides what happens to a partition. The
invariant: every XID has exactly one rule; one that the table does not know has the rule `unknown`.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from partitioner.errors import DocumentError
from partitioner.strict_yaml import StrictModel, parse_located

SOURCE = "partitioner/xids.yaml"


class Action(StrEnum):
    """What mends it, weakest first."""

    IGNORE = "ignore"
    RESTART = "restart"
    RESET = "reset"
    REBOOT = "reboot"
    OPERATOR = "operator"

    @property
    def strength(self) -> int:
        """How much it asks for."""
        return list(Action).index(self)

    @property
    def by_driver(self) -> bool:
        """Whether a driver that tells its own recovery action knows better."""
        return self in (Action.RESET, Action.REBOOT)


class Scope(StrEnum):
    """What it strikes."""

    INSTANCE = "instance"
    GPU = "gpu"


class _Rule(StrictModel):
    xids: tuple[Annotated[int, Field(gt=0, lt=1000)], ...]
    meaning: Annotated[str, Field(min_length=1, max_length=120)]
    action: Action
    scope: Scope
    sure: Literal["high", "medium", "low"]
    source: Literal["guide", "catalog", "ours"]


class _TableFile(StrictModel):
    version: Literal[1]
    xids: tuple[_Rule, ...]
    unknown: _Rule


@dataclass(frozen=True)
class XidRule:
    """What one XID means; see the head of `xids.yaml` for the words."""

    meaning: str
    action: Action
    scope: Scope
    sure: str
    source: str


@dataclass(frozen=True)
class XidTable:
    """All rules."""

    rules: Mapping[int, XidRule]
    unknown: XidRule

    def rule(self, xid: int) -> XidRule:
        """The rule of an XID."""
        return self.rules.get(xid, self.unknown)


def load_xids() -> XidTable:
    """Read the table that ships with the package; raises `DocumentError` where it is broken."""
    resource = importlib.resources.files("partitioner").joinpath("xids.yaml")
    return parse_xids(resource.read_text("utf-8"), SOURCE)


def parse_xids(text: str, source: str) -> XidTable:
    """Read a table's text; raises `DocumentError` with the line of an XID that has two rules."""
    file, lines = parse_located(_TableFile, text, source)
    rules: dict[int, XidRule] = {}
    for index, row in enumerate(file.xids):
        for xid in row.xids:
            if xid in rules:
                raise DocumentError(source, lines[("xids", index)], f"XID {xid} has two rules")
            rules[xid] = _rule(row)
    return XidTable(rules, _rule(file.unknown))


def _rule(row: _Rule) -> XidRule:
    return XidRule(row.meaning, row.action, row.scope, row.sure, row.source)
