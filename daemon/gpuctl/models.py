"""model register, ls and show, pin and unpin.

Registering reads a checkpoint's headers on the daemon's host and loads nothing; the directory is
made absolute here, because the daemon's working directory is not the user's.
"""

from __future__ import annotations

from pathlib import Path

from hotbay.v1 import common_pb2, model_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.output import Column, print_json, print_table
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import NOTHING, count, size, word

COLUMNS = (
    Column("MODEL"), Column("STATE"), Column("PARTITION"), Column("FAMILY"),
    Column("PARAMETERS", right=True), Column("WEIGHTS", right=True), Column("CONTEXT", right=True),
    Column("PINNED"), Column("LABELS"),
)  # fmt: skip


def state_word(state: common_pb2.ModelState.ValueType) -> str:
    """The state as a word: `ACTIVE`."""
    return word(common_pb2.ModelState.Name(state), "MODEL_STATE_")


def register(
    session: Session, name: str, directory: str, version: int, request_id: str, dry_run: bool
) -> None:
    """`gpuctl model register`."""
    model = session.client.register(
        name,
        str(Path(directory).absolute()),
        version=version,
        request_id=request_id,
        validate_only=dry_run,
    )
    if session.json:
        print_json(model)
        return
    newest = max(model.versions, key=lambda one: one.version, default=None)
    shown = next((one for one in model.versions if one.version == version), newest)
    if shown is None:
        print_line(f"{model.name} has no versions")
        return
    verb = "could be registered" if dry_run else "registered"
    print_line(
        f"{shown.key or model.name} {verb}: {shown.family}, {count(shown.parameters)} parameters, "
        f"{size(shown.checkpoint_bytes)} on disk"
    )


def list_models(session: Session) -> None:
    """`gpuctl model ls`."""
    models = session.client.models()
    if session.json:
        print_json(model_pb2.ListModelsResponse(models=models))
        return
    rows = [_row(model, version) for model in models for version in model.versions]
    print_table(COLUMNS, rows, "no models; see gpuctl pull and gpuctl model register")


def show(session: Session, name: str) -> None:
    """`gpuctl model show`."""
    session.names = [name]
    model = session.client.model(name)
    if session.json:
        print_json(model)
        return
    labels = ", ".join(f"{label} = {version}" for label, version in sorted(model.labels.items()))
    print_line(f"model:     {model.name}, version {model.default_version} by default")
    print_line(f"labels:    {labels or NOTHING}" + ("; pinned" if model.pinned else ""))
    for version in model.versions:
        print_line()
        for line in _version_lines(version):
            print_line(line)


def pin(session: Session, name: str, pinned: bool, request_id: str, dry_run: bool) -> None:
    """`gpuctl pin` and `gpuctl unpin`."""
    session.names = [name]
    model = session.client.pin(name, pinned, request_id=request_id, validate_only=dry_run)
    if session.json:
        print_json(model)
        return
    verb = "pinned in host memory" if pinned else "unpinned"
    print_line(f"{name} {'could be' if dry_run else 'is'} {verb}")


def _row(model: model_pb2.Model, version: model_pb2.ModelVersion) -> list[str]:
    labels = sorted(label for label, number in model.labels.items() if number == version.version)
    return [
        version.key,
        state_word(version.state),
        version.partition or NOTHING,
        version.family,
        count(version.parameters),
        size(version.weights_bytes),
        str(version.context_tokens),
        "yes" if version.pinned else NOTHING,
        ", ".join(labels) or NOTHING,
    ]


def _version_lines(version: model_pb2.ModelVersion) -> list[str]:
    where = f" on {version.partition}" if version.partition else ""
    why = f": {version.reason}" if version.reason else ""
    return [
        f"{version.key}",
        f"  state:     {state_word(version.state)}{where}{why}"
        + (f", {size(version.staged_bytes)} of its weights" if version.staged_bytes else ""),
        f"  family:    {version.family}, {count(version.parameters)} parameters, "
        f"{version.layers} layers, vocabulary {version.vocabulary}, "
        f"context {version.context_tokens} tokens",
        f"  bytes:     {size(version.checkpoint_bytes)} on disk, {size(version.image_bytes)} in "
        f"host memory, {size(version.weights_bytes)} on the device, "
        f"{size(version.kv_bytes_per_token)} of KV per token",
        f"  requests:  {version.running} running, {version.waiting} waiting",
        f"  directory: {version.directory}",
        f"  digest:    {version.digest or NOTHING}",
        *([f"  canary:    {version.canary!r}"] if version.canary else []),
    ]
