"""Compiles the processor's operations; all else about the package is said in pyproject.toml.

They are compiled once for each level of x86-64 whose vectors are of use. Where there is no compiler
for them, or on another processor, Hotbay is installed without, and torch computes instead.
"""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("engine/kernels/native")
LEVELS = {
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "x86_64_v3": ["-march=x86-64-v3"],
}
OPTIONS = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]


class BuildLevels(build_ext):
    """Compiles each level in a folder of its own: their objects have the same names."""

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(own, ext)


fingerprint = runpy.run_path(str(FOLDER / "sources.py"))["fingerprint"](FOLDER)
setup(
    cmdclass={"build_ext": BuildLevels},
    ext_modules=[
        Extension(
            f"engine.kernels.native.{level}",
            sources=sorted(map(str, FOLDER.glob("*.cpp"))),
            depends=sorted(map(str, FOLDER.glob("*.h"))),
            define_macros=[("HOTBAY_SOURCES", f"{fingerprint:#x}ULL")],
            language="c++",
            extra_compile_args=[*options, *OPTIONS, *WARNINGS],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
        for level, options in LEVELS.items()
    ],
    options={"build_ext": {"parallel": len(LEVELS)}},
)
