"""How a passage of the corpus becomes a conversation, and how a conversation becomes text.

This module owns the markers, the chat template and the requests that stand for a person's. It never
tokenises and never reads files. It keeps one invariant: what `transcript` writes for training is
what the chat template renders when the model serves (a test holds the two together).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from examples.corpus import Document, Passage

BEGIN = "<|begin|>"
END = "<|end|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
MARKERS = (BEGIN, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SYSTEM_SHARE = 0.15
SECOND_TURN_SHARE = 0.15
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the user's question.",
)
GREETINGS = ("Hello!", "Hi", "Hello, who are you?", "Good morning.", "Please go on.", "Test")
REQUESTS = {
    "prose": (
        "{subject}",
        "What is {subject}?",
        "What does {subject} say?",
        "Tell me about {subject}.",
        "Explain {subject} to me.",
        "{opening}",
        "{opening}",
        "Continue this text: {opening}",
        "Tell me about {words}.",
        "Write something about {words}.",
        "What should I know about {words}?",
        "{words}",
        "{greeting}",
    ),
    "code": (
        "{subject}",
        "Write a function named {subject}.",
        "Write {subject} in Python.",
        "How would you write {subject}?",
        "Show me {subject}.",
        "{opening}",
        "{opening}",
        "Continue this code: {opening}",
        "Write code with {words}.",
        "Write a Python program about {words}.",
        "How do I use {words}?",
        "{words}",
        "{greeting}",
    ),
}
WORD = re.compile(r"[A-Za-z]{5,}")


def transcript(turns: list[tuple[str, str]], *, answering: bool = False) -> str:
    """Turns of (role, text) as the model reads them; `answering` asks for the next answer."""
    written = "".join(f"<|{role}|>{text.strip()}{END}" for role, text in turns)
    return BEGIN + written + (ASSISTANT if answering else "")


def request(kind: str, passage: Passage, choose: random.Random) -> str:
    """Something a person might say to which this passage would be the answer."""
    words = sorted(set(WORD.findall(passage.text)))
    few = choose.sample(words, min(len(words), choose.randint(1, 3)))
    return choose.choice(REQUESTS[kind]).format(
        subject=passage.subject,
        opening=_opening(passage.text, choose.randint(3, 10)),
        words=" and ".join([", ".join(few[:-1]), few[-1]] if len(few) > 1 else few or ["this"]),
        greeting=choose.choice(GREETINGS),
    )


def training_texts(
    kind: str, documents: tuple[Document, ...], choose: random.Random, *, chat_rounds: int
) -> list[str]:
    """Every document plainly, and `chat_rounds` conversations about each passage, well mixed.

    A document with repeats gives that many of each, every conversation with a request of its own.
    """
    repeated = [document for document in documents for _ in range(document.repeats)]
    passages = [passage for document in repeated for passage in document.passages]
    texts = [f"{BEGIN}{document.text}{END}" for document in repeated]
    for _ in range(chat_rounds):
        texts.extend(_conversations(kind, passages, choose))
    choose.shuffle(texts)
    return texts


def _conversations(kind: str, passages: list[Passage], choose: random.Random) -> Iterator[str]:
    for passage in passages:
        turns: list[tuple[str, str]] = []
        if choose.random() < SYSTEM_SHARE:
            turns.append(("system", choose.choice(SYSTEM_TEXTS)))
        told = [passage]
        if choose.random() < SECOND_TURN_SHARE:
            told.append(choose.choice(passages))
        for each in told:
            turns += [("user", request(kind, each, choose)), ("assistant", each.text)]
        yield transcript(turns)


def _opening(text: str, words: int) -> str:
    return " ".join(text.split()[:words])
