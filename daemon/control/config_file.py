"""Reading the configuration: a TOML file, overridden by flags, checked whole before anything runs.

This is the only module that reads the environment. What nobody gave is filled in here, from the
host; an unknown key is refused with the nearest known one, since a misspelt limit would silently
not be one.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from daemon.control.config import Config, Models, hub_address
from daemon.control.errors import ConfigInvalid
from daemon.control.processor import computes_bfloat16
from engine.link.directories import runtime_dir_problem

HUB_ENDPOINT = "https://huggingface.co"
TRUE_WORDS = ("1", "ON", "YES", "TRUE")


def load(
    path: Path | None,
    overrides: Mapping[str, str],
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """Read `path` (None: defaults), let `overrides` (keys of [node]) win, fill in what is derived.

    Raises ConfigInvalid with one line for each mistake.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigInvalid(f"cannot read the configuration {path}: {error}") from error
    node = values.setdefault("node", {})
    if isinstance(node, dict):
        node.update({key: value for key, value in overrides.items() if value})
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        source = str(path) if path is not None else "the command line"
        raise ConfigInvalid(f"{source} is refused:\n" + "\n".join(_explain(error))) from None
    return _complete(config, environment)


def _complete(config: Config, environment: Mapping[str, str]) -> Config:
    node = config.node
    root = os.geteuid() == 0
    home = Path(environment.get("HOME", "/"))
    runtime = node.runtime_dir or environment.get("RUNTIME_DIRECTORY", "")
    if not runtime:
        base = environment.get("XDG_RUNTIME_DIR", "")
        if not root and not base:
            raise ConfigInvalid("XDG_RUNTIME_DIR is not set: give --runtime-dir DIR")
        runtime = "/run/hotbay" if root else f"{base}/hotbay"
    if problem := runtime_dir_problem(Path(runtime)):
        raise ConfigInvalid(problem)
    state = node.state_dir or environment.get("STATE_DIRECTORY", "")
    if not state:
        base = environment.get("XDG_STATE_HOME", str(home / ".local/state"))
        state = "/var/lib/hotbay" if root else f"{base}/hotbay"
    repository = str(Path(node.repository).absolute()) if node.repository else ""
    if repository and not Path(repository).is_dir():
        raise ConfigInvalid(f"the repository {repository} is not a directory")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    node = node.model_copy(
        update={
            "runtime_dir": str(Path(runtime).absolute()),
            "state_dir": str(Path(state).absolute()),
            "repository": repository,
        }
    )
    budget_bytes = config.host_store.budget_bytes or memory // 2
    store = config.host_store.model_copy(update={"budget_bytes": budget_bytes})
    images = Path(config.image_cache.directory or Path(node.state_dir) / "images").absolute()
    cache = config.image_cache.model_copy(update={"directory": str(images)})
    worker = config.worker
    if worker.dtype == "auto":
        fast = not node.simulate or computes_bfloat16()
        worker = worker.model_copy(update={"dtype": "bfloat16" if fast else "float32"})
    failpoints = environment.get("HOTBAY_FAILPOINTS", "") or config.failpoints
    return config.model_copy(
        update={
            "node": node,
            "worker": worker,
            "host_store": store,
            "image_cache": cache,
            "models": _complete_models(config.models, Path(node.state_dir), environment),
            "failpoints": failpoints,
        }
    )


def _complete_models(models: Models, state_dir: Path, environment: Mapping[str, str]) -> Models:
    try:
        endpoint = (
            models.hub_endpoint or hub_address(environment.get("HF_ENDPOINT", "")) or HUB_ENDPOINT
        )
    except ValueError as error:
        raise ConfigInvalid(f"HF_ENDPOINT of the environment is refused: {error}") from None
    token_file = models.token_file and str(Path(models.token_file).absolute())
    return models.model_copy(
        update={
            "directory": str(Path(models.directory or state_dir / "models").absolute()),
            "hub_endpoint": endpoint,
            "token_file": token_file,
            "offline": models.offline
            or environment.get("HF_HUB_OFFLINE", "").upper() in TRUE_WORDS,
        }
    )


def _explain(error: ValidationError) -> list[str]:
    """One line for each mistake: where, what, and the nearest known key for an unknown one."""
    lines = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            known = list(Config.model_fields)
            if len(place) > 1:
                section = Config.model_fields[place[0]].annotation
                known = list(section.model_fields) if section is not None else []
            near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(known)}"
            where = f" in [{place[0]}]" if len(place) > 1 else ""
            lines.append(f"  unknown key `{place[-1]}`{where}{hint}")
        else:
            key = f"[{place[0]}] {'.'.join(place[1:])}".rstrip()
            lines.append(f"  {key}: {item['msg']} (given: {item['input']!r})")
    return lines
