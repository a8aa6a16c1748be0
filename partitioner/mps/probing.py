"""Which language a driver's control program speaks, asked of the program itself.

It owns the question, which starts no daemon. It never decides by a driver's number. The invariant:
a place inside a MIG instance is given the legacy protocol, which works there on every driver; that
namespaces do is nowhere promised. So is one whose shares have multiprocessors to themselves.
"""

from __future__ import annotations

from pathlib import Path

from partitioner.errors import MpsCommandError, MpsUnavailableError
from partitioner.mps.commands import Commands
from partitioner.mps.control import Language, MpsControl
from partitioner.mps.legacy import LegacyControl
from partitioner.mps.named import NamedControl
from partitioner.mps.static import FIRST_DRIVER, FIRST_VERSION, version_of

QUESTION = ("-p", "3", "-h")
NAMED_WORD = "namespace"
"""In the answer of a program that has servers by name."""


async def refuse_without_static(program: tuple[str, ...], directory: Path) -> None:
    """Raise `MpsUnavailableError` where the program is older than static SM partitions."""
    version = version_of(await Commands(program, directory, {}).ask("-v"))
    if version < FIRST_VERSION:
        raise MpsUnavailableError(
            f"shares with `sm` need an nvidia-cuda-mps-control of version {FIRST_VERSION} or newer "
            f"(CUDA 13.1, driver {FIRST_DRIVER}), this one is {version or 'of no known version'}: "
            "update the driver, or write `threads` in place of `sm`"
        )


async def language_of(program: tuple[str, ...], directory: Path) -> Language:
    """The newest language that the program speaks. Raises `MpsUnavailableError` without one."""
    commands = Commands(program, directory, {})
    try:
        told = await commands.ask(*QUESTION)
    except MpsCommandError:
        return Language.LEGACY  # It does not know the option.
    return Language.NAMED if NAMED_WORD in told else Language.LEGACY


def control(
    language: Language, program: tuple[str, ...], directory: Path, device: str
) -> MpsControl:
    """The daemon of these directories, in this language."""
    made = NamedControl if language is Language.NAMED else LegacyControl
    return made(program, directory, device)
