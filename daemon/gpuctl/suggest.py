""" "Did you mean": the nearest name that exists, for one that does not.

It asks the daemon for the names after a NotFound, and only then. It never acts on a guess.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

from hotbay.errors import HotbayError
from hotbay.reasons import Reason

if TYPE_CHECKING:
    from hotbay.client import Client
    from hotbay.v1.model_pb2 import Model

# difflib's ratio below which two names are not alike.
ALIKE_MIN = 0.6


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None."""
    matches = get_close_matches(name, sorted(known), n=1, cutoff=ALIKE_MIN)
    return matches[0] if matches else None


def model_names(models: Iterable[Model]) -> set[str]:
    """Everything a model can be called: `name`, `name@version`, `name@label`."""
    names: set[str] = set()
    for model in models:
        names.add(model.name)
        names.update(f"{model.name}@{version.version}" for version in model.versions)
        names.update(f"{model.name}@{label}" for label in model.labels)
    return names


def did_you_mean(client: Client, names: Iterable[str], error: HotbayError) -> str:
    """A sentence with the name nearest to one of `names`, which the user wrote, or nothing: also
    where the daemon guessed already."""
    if "suggestions" in error.metadata:
        return ""
    try:
        if error.reason == Reason.MODEL_NOT_FOUND:
            known = model_names(client.models())
        elif error.reason == Reason.PARTITION_NOT_FOUND:
            known = {partition.id for partition in client.partitions()}
        else:
            return ""
    except HotbayError:
        # The first error is what the user should read; a guess is not worth a second one.
        return ""
    for name in names:
        if name not in known and (guess := nearest(name, known)):
            return f"did you mean {guess!r} instead of {name!r}?"
    return ""
