"""Lengths of prompts and answers for the workloads that whole runs are measured with.

Owns the tables and how they are drawn. Chats are like those that people share: most are short, some
are very long; both lengths are log-normal, cut at a bound, and the table of them is committed
(`bench/lengths_chat.csv`), so that every run everywhere has the same. `python -m bench.lengths`
writes it anew. Invariant: a workload of a name is the same list on every machine.
"""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("lengths_chat.csv")
CHATS, CHAT_SEED = 1000, 20
CHAT_LENGTH_MIN, CHAT_LENGTH_MAX = 4, 2048
PROMPT_MEDIAN, PROMPT_SIGMA = 70.0, 1.4
ANSWER_MEDIAN, ANSWER_SIGMA = 150.0, 0.9
UNIFORM, UNIFORM_SEED = 256, 0
UNIFORM_LENGTH_MIN, UNIFORM_LENGTH_MAX = 100, 1024


@dataclass(frozen=True)
class Lengths:
    """One request: tokens of its prompt and of its answer."""

    prompt: int
    answer: int


def chats() -> list[Lengths]:
    """The committed table."""
    with TABLE.open(encoding="ascii", newline="") as file:
        return [Lengths(int(row["prompt"]), int(row["answer"])) for row in csv.DictReader(file)]


def uniform() -> list[Lengths]:
    """256 requests of 100 to 1,024 tokens in and out, as small engines are compared with."""
    draw = random.Random(UNIFORM_SEED)
    return [
        Lengths(
            draw.randint(UNIFORM_LENGTH_MIN, UNIFORM_LENGTH_MAX),
            draw.randint(UNIFORM_LENGTH_MIN, UNIFORM_LENGTH_MAX),
        )
        for _ in range(UNIFORM)
    ]


def draw_chats() -> list[Lengths]:
    """What the committed table was drawn as."""
    draw = random.Random(CHAT_SEED)

    def length(median: float, sigma: float) -> int:
        drawn = round(draw.lognormvariate(math.log(median), sigma))
        return min(max(drawn, CHAT_LENGTH_MIN), CHAT_LENGTH_MAX)

    return [
        Lengths(length(PROMPT_MEDIAN, PROMPT_SIGMA), length(ANSWER_MEDIAN, ANSWER_SIGMA))
        for _ in range(CHATS)
    ]


def write_table(path: Path = TABLE) -> None:
    """Write the table of chats."""
    rows = ["prompt,answer", *(f"{one.prompt},{one.answer}" for one in draw_chats())]
    path.write_text("\n".join(rows) + "\n", encoding="ascii")


if __name__ == "__main__":
    write_table()
