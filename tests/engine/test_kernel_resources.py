"""What the compiled kernels take: the committed table is true, whole, and without spills."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="triton compiles the kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton compiles nothing while it interprets", allow_module_level=True)

from engine.kernels.triton import compile as harness  # noqa: E402
from engine.kernels.triton.variants import Variant, all_variants  # noqa: E402

COMPILED_TARGET = 90
"""The suite compiles for one generation; scripts/kernels --check for all of them."""


@pytest.fixture(scope="module")
def table():
    return harness.read_table()


def test_the_table_was_measured_on_these_sources(table):
    """Anything that changes a kernel, and then `scripts/kernels` was not run, fails here."""
    if table["triton"] != triton.__version__:
        pytest.skip(f"measured with triton {table['triton']}, and this is {triton.__version__}")
    wanted = {variant.label: harness.described(variant) for variant in all_variants()}
    found = {
        label: {key: value for key, value in entry.items() if not key.startswith("sm_")}
        for label, entry in table["variants"].items()
    }
    assert found == wanted, "run scripts/kernels"


def test_every_generation_was_measured(table):
    for variant in all_variants():
        entry = table["variants"][variant.label]
        assert {f"sm_{target}" for target in variant.targets} <= entry.keys(), variant.label


def test_no_hot_kernel_spills(table):
    assert not harness.spilling(table)
    assert any(entry["hot"] for entry in table["variants"].values())


def test_a_spill_would_be_found(table):
    label, entry = next(one for one in table["variants"].items() if one[1]["hot"])
    spilled = {**entry, "sm_90": {**entry["sm_90"], "stack_bytes": 8}}
    assert harness.spilling({"variants": {label: spilled}}) == [f"{label} on sm_90: 8 bytes"]
    assert not harness.spilling({"variants": {label: {**spilled, "hot": False}}})


def test_the_page_shows_the_table(table):
    assert harness.PAGE_PATH.read_text(encoding="utf-8") == harness.render(table)


def first_of_each_kernel() -> list[Variant]:
    """The first hot variant of each kernel."""
    found: dict[str, Variant] = {}
    for variant in all_variants():
        if variant.hot and COMPILED_TARGET in variant.targets:
            found.setdefault(variant.kernel.__name__, variant)
    return list(found.values())


@pytest.mark.parametrize("variant", first_of_each_kernel(), ids=lambda one: one.label)
def test_compiling_again_takes_what_the_table_says(variant, table):
    found = harness.measure(variant, COMPILED_TARGET)
    assert found.registers > 0
    assert found.stack_bytes == 0
    if table["triton"] == triton.__version__:
        said = table["variants"][variant.label][f"sm_{COMPILED_TARGET}"]
        assert harness.asdict(found) == said


def test_a_fingerprint_follows_source_configuration_and_compiler():
    one, *_ = all_variants()
    mine = one.fingerprint("3.7.1")
    assert one.fingerprint("3.7.1") == mine
    assert one.fingerprint("3.8.0") != mine
    assert replace(one, num_warps=one.num_warps * 2).fingerprint("3.7.1") != mine
    assert replace(one, constexprs={**one.constexprs, "MORE": 1}).fingerprint("3.7.1") != mine
    assert replace(one, signature={**one.signature, "more": "i32"}).fingerprint("3.7.1") != mine


def test_differences_name_what_changed():
    same = {"hot": True, "sm_90": {"registers": 32}}
    before = {"variants": {"a": same, "gone": same}}
    after = {"variants": {"a": {**same, "sm_90": {"registers": 40}}, "new": same}}
    assert harness.differences(before, after) == [
        "a, sm_90: {'registers': 32} -> {'registers': 40}",
        "gone: gone",
        "new: new",
    ]
    assert not harness.differences(after, after)
