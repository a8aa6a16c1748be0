"""Which machine code is there, which of it is used, and what is computed without."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.canary import runtime_of
from engine.kernels.choose import choose_kernels
from engine.kernels.native import machine_code
from engine.kernels.native.kernels import NativeKernels, computes
from engine.kernels.native.machine_code import best_library, describe, levels_here, load
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kv_layout import KvLayout
from tests.engine.sequences import PAGE_BYTES, make_spec

FOLDER = Path(machine_code.__file__).parent
STRANGER = Path(torch.__file__).parent / "lib" / "libshm.so"


def has_gcc() -> bool:
    """Whether an installation here finds a compiler that it knows to do."""
    if shutil.which("c++") is None:
        return False
    told = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    return "Free Software Foundation" in told


@pytest.mark.skipif(not has_gcc(), reason="there is no GCC here")
def test_every_level_was_compiled_and_is_what_this_processor_computes_with() -> None:
    assert all(load(level) is not None for level in levels_here())
    assert best_library() is (load(levels_here()[0]) if levels_here() else None)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="nothing reads machine code here")
def test_a_lower_level_has_no_instruction_of_a_higher_one(loaded: ctypes.CDLL) -> None:
    wide = {
        level: "%zmm"
        in subprocess.run(
            ["objdump", "-d", str(path)], capture_output=True, text=True, check=True
        ).stdout
        for level in ("x86_64_v3", "x86_64_v4")
        for path in FOLDER.glob(f"{level}*.so")
    }
    assert wide == {"x86_64_v3": False, "x86_64_v4": True}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folder, that libraries are loaded from."""
    copied = tmp_path / "native"
    shutil.copytree(FOLDER, copied)
    monkeypatch.setattr(machine_code, "__file__", str(copied / "machine_code.py"))
    yield forget(copied)
    forget(copied)


def forget(folder: Path) -> Path:
    machine_code.load.cache_clear()
    machine_code.best_library.cache_clear()
    return folder


def test_a_library_of_other_sources_is_not_called(
    loaded: ctypes.CDLL, elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert best_library() is not None
    before = describe()
    forget(elsewhere)
    with (elsewhere / "lanes.h").open("a") as header:
        header.write("// changed since\n")
    assert best_library() is None
    assert "was compiled from other sources" in caplog.text
    assert describe() == "torch" != before


def test_what_is_no_library_of_ours_is_not_called(
    loaded: ctypes.CDLL, elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in elsewhere.glob("*.so"):
        path.write_bytes(b"no machine code")
    assert best_library() is None
    for path in elsewhere.glob("*.so"):
        shutil.copy(STRANGER, path)
    forget(elsewhere)
    assert best_library() is None
    assert caplog.text.count("cannot be used") == 2 * len(levels_here())
    assert "GCC 11" in caplog.text


def test_recorded_results_say_what_computed_them(loaded: ctypes.CDLL, elsewhere: Path) -> None:
    host = torch.device("cpu")
    before = runtime_of(host, "float32")
    for path in elsewhere.glob("*.so"):
        path.unlink()
    forget(elsewhere)
    assert runtime_of(host, "float32") != before


def test_what_it_does_not_compute_is_torchs(loaded: ctypes.CDLL) -> None:
    """A head of another size, another dtype, FP8: the same engine over the reference."""
    spec = make_spec(4, 2, 16)
    memory = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    layout = KvLayout.choose(spec, "float32", PAGE_BYTES)
    assert isinstance(choose_kernels(spec, layout, memory), NativeKernels)
    odd = make_spec(4, 2, 24)
    for other, its in (
        (odd, KvLayout.choose(odd, "float32", PAGE_BYTES)),
        (spec, KvLayout.choose(spec, "float16", PAGE_BYTES)),
        (spec, KvLayout.choose(spec, "float32", PAGE_BYTES, fp8=True)),
    ):
        assert not computes(other, its)
        assert isinstance(choose_kernels(other, its, memory), ReferenceKernels)
