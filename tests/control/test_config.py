"""The configuration: what is refused, how it says so, and what is derived."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daemon.control import config_file
from daemon.control.config import Config
from daemon.control.config_file import load
from daemon.control.config_text import as_toml
from daemon.control.errors import ConfigInvalid
from daemon.control.processor import computes_bfloat16
from engine.link.control import InFlight


def read(tmp_path: Path, text: str, **overrides: str) -> Config:
    path = tmp_path / "hotbayd.toml"
    path.write_text(text)
    return load(path, {"runtime_dir": "/run/x", "state_dir": "/var/x", **overrides}, {})


def test_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    config = read(tmp_path, "")
    assert (config.node.http, config.node.grpc) == ("127.0.0.1:8000", "127.0.0.1:8001")
    assert str(config.control_socket) == "/run/x/control.sock"
    scheduling = config.scheduling
    assert (scheduling.max_active_models, scheduling.swap_on_demand) == (0, True)
    assert (scheduling.min_residency_s, scheduling.hold_timeout_s) == (1.0, 60.0)
    assert config.limits.operation_history_s >= 24 * 3600
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert config.host_store.budget_bytes == memory // 2


def test_images_on_disk_are_below_the_state_unless_said_otherwise(tmp_path: Path) -> None:
    config = read(tmp_path, "")
    assert config.image_cache.directory == "/var/x/images"
    assert (config.image_cache.budget_bytes, config.image_cache.keep) == (64 << 30, "packed")
    assert config.host_store.spare_bytes == 32 << 30
    assert (config.limits.builds_max, config.limits.build_threads) == (2, 4)
    text = '[image_cache]\ndirectory = "/big"\nbudget_bytes = 9\n[host_store]\nhuge_pages = "off"\n'
    config = read(tmp_path, text)
    assert (config.image_cache.directory, config.image_cache.budget_bytes) == ("/big", 9)
    assert config.host_store.huge_pages == "off"
    assert config.host_store.budget_bytes > 0


def test_flags_win_over_the_file_and_empty_ones_do_not(tmp_path: Path) -> None:
    text = '[node]\nhttp = "127.0.0.1:1"\ngrpc = "127.0.0.1:2"\n'
    config = read(tmp_path, text, http="127.0.0.1:9", grpc="")
    assert (config.node.http, config.node.grpc) == ("127.0.0.1:9", "127.0.0.1:2")


def test_values_are_read_with_their_types(tmp_path: Path) -> None:
    config = read(tmp_path, '[scheduling]\nin_flight = "recompute"\nmin_residency_s = 2\n')
    assert config.scheduling.in_flight is InFlight.RECOMPUTE
    assert config.scheduling.min_residency_s == 2.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[scheduling]\nmin_residence_s = 1\n", "did you mean `min_residency_s`"),
        ("[schedulin]\n", "unknown key `schedulin`; did you mean `scheduling`"),
        ("[worker]\nxyz = 1\n", "known are threads"),
        ("[worker]\nthreads = -1\n", r"\[worker\] threads: .*greater than or equal to 0"),
        ("[worker]\npage_bytes = 3000000\n", "multiple of 2 MiB"),
        ('[worker]\nstep_tokens = "many"\n', r"\[worker\] step_tokens: .*integer"),
        ('[worker]\ndtype = "int8"\n', "'float32', 'bfloat16', 'float16' or 'auto'"),
        ("[scheduling]\nhold_timeout_s = nan\n", "hold_timeout_s"),
        ("[scheduling.weights]\nchat = 0\n", r"\[scheduling\] weights.chat: .*equal to 0.01"),
        ('[scheduling]\nin_flight = "wait"\n', "in_flight"),
        ('[node]\nhttp = "8000"\n', "HOST:PORT"),
        ('[node]\nhttp = "example.org:80"\n', "neither an IP address nor localhost"),
        ('[node]\nrepository = "/nowhere/at/all"\n', "not a directory"),
        ("[limits]\noperation_history_s = 60\n", "operation_history_s"),
        ('[host_store]\nhuge_pages = "4KiB"\n', "'auto', 'transparent' or 'off'"),
        ("[limits]\nbuilds_max = 0\n", "builds_max"),
        ("[image_cache]\nbudget_bytes = -1\n", "budget_bytes"),
        ("[node\n", "cannot read the configuration"),
    ],
)
def test_mistakes_are_refused_and_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigInvalid, match=problem):
        read(tmp_path, text)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        read(tmp_path, "[worker]\nthreads = -1\nfoo = 1\n[scheduling]\nmin_residency_s = -1\n")
    assert len(str(refused.value).splitlines()) == 4


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"absent\.toml"):
        load(tmp_path / "absent.toml", {}, {})


@pytest.mark.parametrize(
    ("uid", "environment", "runtime"),
    [
        (0, {}, "/run/hotbay"),
        (1000, {"XDG_RUNTIME_DIR": "/run/user/1000"}, "/run/user/1000/hotbay"),
        (0, {"RUNTIME_DIRECTORY": "/run/hotbay-2"}, "/run/hotbay-2"),
    ],
)
def test_directories_follow_from_who_runs_it(
    monkeypatch: pytest.MonkeyPatch, uid: int, environment: dict[str, str], runtime: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    config = load(None, {}, {"HOME": "/home/me", **environment})
    assert str(config.runtime_dir) == runtime
    expected = "/var/lib/hotbay" if uid == 0 else "/home/me/.local/state/hotbay"
    assert str(config.state_dir) == expected


def test_without_a_runtime_directory_it_says_which_flag_to_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigInvalid, match="--runtime-dir"):
        load(None, {}, {})


@pytest.mark.parametrize(
    ("packed", "dtype", "made"),
    [
        ("true", "bfloat16", "bfloat16-packed"),
        ("true", "float32", "float32"),
        ("false", "bfloat16", "bfloat16"),
    ],
)
def test_only_bfloat16_images_are_packed(
    tmp_path: Path, packed: str, dtype: str, made: str
) -> None:
    text = f'[host_store]\npacked = {packed}\n[worker]\ndtype = "{dtype}"\n'
    config = read(tmp_path, text)
    assert config.image_dtype == made
    assert config.host_store.packed == (packed == "true")
    assert config.host_store.budget_bytes > 0


def test_a_models_weight_is_its_own_or_its_names_or_one(tmp_path: Path) -> None:
    config = read(tmp_path, '[scheduling.weights]\nchat = 3\n"chat@2" = 0.5\n')
    weight = config.scheduling.weight
    assert (weight("chat@1"), weight("chat@2"), weight("code@1")) == (3.0, 0.5, 1.0)
    shown = tmp_path / "shown.toml"
    shown.write_text(as_toml(config))
    assert load(shown, {}, {}).scheduling == config.scheduling


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("flags\t\t: fpu sse avx512_bf16 avx512f\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu sse avx512f\nbugs\t\t: avx512_bf16\n", False),
        ("", False),
    ],
)
def test_the_dtype_follows_the_processors_instructions_if_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, found: bool
) -> None:
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text(listed)
    assert computes_bfloat16(cpu_info) is found
    monkeypatch.setattr(config_file, "computes_bfloat16", lambda: found)
    simulated = '[node]\nsimulate = "H100x1"\n'
    for text in ("", '[worker]\ndtype = "auto"\n'):
        on_host = read(tmp_path, text + simulated)
        assert on_host.image_dtype == on_host.worker.dtype == ("bfloat16" if found else "float32")
        assert read(tmp_path, text).worker.dtype == "bfloat16"
    assert read(tmp_path, '[worker]\ndtype = "float32"\n').worker.dtype == "float32"


def test_nothing_is_made_before_the_dtype_was_found() -> None:
    with pytest.raises(AssertionError, match=r"config_file\.load"):
        _ = Config().image_dtype


def test_what_is_shown_names_the_dtype_that_was_found(tmp_path: Path) -> None:
    shown = as_toml(read(tmp_path, ""))
    assert 'dtype = "bfloat16"\nkv_dtype = "auto"' in shown


def test_a_processor_that_says_nothing_has_nothing(tmp_path: Path) -> None:
    assert not computes_bfloat16(tmp_path / "absent")
