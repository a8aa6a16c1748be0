"""The catalogue of reasons, and the errors of every package against it."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2
from hotbay.errors import REFUSALS, Refused, ServerFailed, refusal
from hotbay.reasons import Code, Reason, known

ROOT = Path(__file__).resolve().parents[2]
# Never cross the control API: the process that would answer is the one that could not start, or
# they name a base class whose children have reasons of their own.
INTERNAL_ONLY = {"ALREADY_RUNNING", "INVALID_OPTION", "SWAP_ERROR"}
REASON = re.compile(r'^ {4}reason(?:: ClassVar\[str\])? = "([A-Z_]+)"', re.MULTILINE)


def test_every_reason_is_its_own_name_and_says_what_to_do() -> None:
    assert len(Reason) > 40
    for name, reason in Reason.__members__.items():
        assert reason == name
        assert reason.value == name
        assert f"{reason}" == name
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*[A-Z0-9]", name)
        assert len(name) <= 63  # the bound that google.rpc.ErrorInfo sets
        assert len(reason.advice) > 15
        assert not reason.advice.endswith(".")


def test_codes_are_those_of_grpc() -> None:
    for code in Code:
        assert code_pb2.Code.Value(code.name) == code
        assert grpc.StatusCode[code.name].value[0] == code
    assert len(Code) == len(grpc.StatusCode)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.MODEL_NOT_FOUND, Code.NOT_FOUND),
        (Reason.INSUFFICIENT_DEVICE_MEMORY, Code.RESOURCE_EXHAUSTED),
        (Reason.OPERATION_IN_PROGRESS, Code.ABORTED),
        (Reason.INVALID_STATE, Code.FAILED_PRECONDITION),
        (Reason.CORRUPT_WEIGHTS, Code.DATA_LOSS),
        (Reason.DAEMON_DRAINING, Code.UNAVAILABLE),
        (Reason.RESUME_TOKEN_EXPIRED, Code.OUT_OF_RANGE),
        (Reason.REQUEST_ID_REUSED, Code.INVALID_ARGUMENT),
        (Reason.NOT_IMPLEMENTED, Code.UNIMPLEMENTED),
    ],
)
def test_published_reasons_keep_their_code(reason: Reason, code: Code) -> None:
    assert reason.code is code


def test_an_unknown_reason_is_no_error() -> None:
    assert known("SOMETHING_NEW") is None
    assert known("QUEUE_FULL") is Reason.QUEUE_FULL
    error = refusal(Code.INTERNAL, "it broke", reason="SOMETHING_NEW", metadata={})
    assert error.advice == ""


def test_every_code_becomes_an_error_of_the_tree() -> None:
    for code in Code:
        error = refusal(code, "words", metadata={"needed": "1"})
        assert isinstance(error, Refused)
        assert type(error) is REFUSALS.get(code, ServerFailed)
        assert (error.code, error.message, error.metadata) == (code, "words", {"needed": "1"})


def test_reasons_of_all_packages_are_in_the_catalogue() -> None:
    folders = ("daemon", "engine", "partitioner", "swap")
    files = [file for folder in folders for file in (ROOT / folder).rglob("errors.py")]
    named = {
        (str(file.relative_to(ROOT)), reason)
        for file in files
        for reason in REASON.findall(file.read_text())
        if reason not in INTERNAL_ONLY
    }
    assert len(named) > 10
    assert {one for one in named if known(one[1]) is None} == set()
