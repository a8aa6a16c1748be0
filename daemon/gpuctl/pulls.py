"""pull: have the daemon fetch a model from its hub, and follow that.

It makes one call; what is needed of a repository and whether it fits is the daemon's to know.
"""

from __future__ import annotations

from pathlib import Path

from google.longrunning.operations_proto_pb2 import Operation
from hotbay.operations import operation_response
from hotbay.v1 import model_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.follow import follow
from daemon.gpuctl.moves import How, model_sentence
from daemon.gpuctl.output import print_json
from daemon.gpuctl.session import Session


def pull(session: Session, repository: str, name: str, token_file: str, how: How) -> None:
    """`gpuctl pull`."""
    owner_and_name, _, revision = repository.partition("@")
    operation = session.client.pull(
        owner_and_name,
        revision=revision,
        name=name,
        token_file=str(Path(token_file).absolute()) if token_file else "",
        request_id=how.request_id,
        validate_only=how.dry_run,
    )
    if how.dry_run:
        _show_plan(session, operation)
        return

    def describe(done: Operation) -> str:
        response = operation_response(done)
        assert isinstance(response, model_pb2.ModelOperationResponse)
        return model_sentence(done, f"pulled {owner_and_name} as {response.model}")

    follow(session, operation, wait=how.wait, describe=describe, undo=lambda _: "")


def _show_plan(session: Session, operation: Operation) -> None:
    if session.json:
        print_json(operation)
        return
    response = operation_response(operation)
    assert isinstance(response, model_pb2.ModelOperationResponse)
    print_line(f"plan:      {response.model} from {response.message}")
    print_line("nothing was changed")
