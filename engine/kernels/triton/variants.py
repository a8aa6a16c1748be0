"""How a kernel says in which configurations the engine launches it.

Owns the description of a compiled kernel and the list of all of them. Every module of this package
that has a kernel also has a function `variants()`, which returns some; nothing else registers it.
Invariant: a variant is compiled as a launch would be, alignment of arguments included, so that its
registers and shared memory are those of the machine code that runs.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton

import engine.kernels.triton as package

FP8_TARGETS = (90, 100)
"""Generations that convert FP8 themselves; the first that does is 8.9."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration of a kernel.

    `signature` gives each argument that is no constexpr its type in the kernel's order, `*` for a
    pointer and `:16` for what is always divisible by 16, as a launch finds out by itself:
    `{"rows": "*bf16:16", "width": "i32:16", "count": "i32", "epsilon": "fp32"}`. An argument that
    is always 1 or None in this configuration is a constexpr, as it is in a launch.
    """

    name: str
    """What distinguishes it from the kernel's others, as `bf16 dim 128 group 4`."""
    kernel: Any
    """The function under `triton.jit`."""
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    """Registers of a thread at most, where the launch says so."""
    fuses: bool = True
    """Whether a product and a sum may become one operation, with one rounding."""
    hot: bool = True
    """Whether it runs in every step of a model people serve: then it may not spill."""
    targets: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities to compile it for, as 90 for 9.0."""

    @property
    def label(self) -> str:
        """Kernel and name, one of a kind."""
        return f"{self.kernel.__name__} {self.name}"

    def fingerprint(self, triton_version: str) -> str:
        """Changes when the machine code may: with the source, the configuration or triton."""
        parts = [triton_version, repr(sorted(self.signature.items()))]
        parts += [repr(sorted((key, str(value)) for key, value in self.constexprs.items()))]
        parts += [f"{self.num_warps} {self.num_stages} {self.maxnreg} {self.fuses}"]
        parts += _sources(self.kernel)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the processor. Its products of bfloat16 are
    wrong, so kernels widen what they multiply there."""
    return bool(triton.knobs.runtime.interpret)


def all_variants() -> list[Variant]:
    """Those of every module of this package, sorted by label. Raises ValueError for a name used
    twice or a kernel without variants."""
    found: dict[str, Variant] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for variant in module.variants() if hasattr(module, "variants") else ():
            if variant.label in found:
                raise ValueError(f"two variants are called {variant.label}: rename one")
            found[variant.label] = variant
    return [found[label] for label in sorted(found)]


def _sources(kernel: Any) -> list[str]:
    """The kernel's source and that of every other it calls, each once, and constants of both."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        if function.__name__ in found:
            continue
        found[function.__name__] = function.src
        names = function.fn.__code__.co_names
        used = {name: function.fn.__globals__.get(name) for name in names}
        waiting += [one for one in used.values() if hasattr(one, "src") and hasattr(one, "fn")]
        for name, one in used.items():
            if isinstance(one, triton.language.constexpr):
                found[name] = f"{name} = {one.value}"
    return [found[name] for name in sorted(found)]
