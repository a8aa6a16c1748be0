"""Words and figures for people: bytes, times, states, and text from elsewhere made safe.

Pure functions over plain values. Text that the daemon or a model made passes through `printable`
before it reaches a terminal: control characters would move the cursor, rename the window or worse.
"""

from __future__ import annotations

import math
import re
import shlex

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
NOTHING = "-"
# C0 controls but tab and newline, DEL, C1 controls, and the marks that reverse text direction.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SPACES = re.compile(r"[\t\n]+")


def printable(text: str) -> str:
    """`text` with control characters written out as `\\x1b`; tabs and newlines stay."""
    return CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def one_line(text: str) -> str:
    """`printable`, and on one line, as a cell of a table has to be."""
    return SPACES.sub(" ", printable(text))


def size(count_bytes: float) -> str:
    """Bytes in binary units with three significant figures: `1.50 GiB`."""
    value = float(count_bytes)
    for unit in UNITS:
        if abs(value) < 999.5 or unit == UNITS[-1]:
            break
        value /= 1024
    if unit == UNITS[0]:
        return f"{int(value)} B"
    digits = max(0, 2 - int(math.log10(abs(value)))) if abs(value) >= 1 else 2
    return f"{value:.{digits}f} {unit}"


def rate(bytes_per_second: float) -> str:
    """A transfer rate in decimal GB/s, the unit links are sold in."""
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def count(value: int) -> str:
    """A large number in short: `28.3M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    return str(value)


def share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent, or nothing when there is no whole."""
    return f"{100 * part / whole:.0f}%" if whole > 0 else NOTHING


def milliseconds(value: float) -> str:
    """A short time: `12.3 ms`, `0.41 s`."""
    if value >= 100:
        return f"{value / 1000:.2f} s"
    return f"{value:.1f} ms"


def age(seconds: float) -> str:
    """How long ago, in the two largest units: `3 m 12 s`."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        amount, left = divmod(left, length)
        if amount or parts or unit == "s":
            parts.append(f"{amount} {unit}")
    return " ".join(parts[:2])


def word(enum_name: str, prefix: str) -> str:
    """The last part of an enum's name: `MODEL_STATE_ACTIVE` becomes `ACTIVE`."""
    short = enum_name.removeprefix(prefix)
    return NOTHING if short == "UNSPECIFIED" else short


def command_line(*words: str) -> str:
    """A command that can be pasted into a shell."""
    return " ".join(shlex.quote(part) for part in words)
