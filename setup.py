"""Packages and the C++ library; all metadata stands in pyproject.toml.

The library steer_engine/_csrc.so is built by CMake (CMakeLists.txt). Environment variables:

    STEER_CSRC          AUTO (default): without compiler, CMake or Torch's headers the install
                        leaves csrc out, says so and succeeds; ON: that is an error; OFF: not built.
    TORCH_INCLUDE_DIR   Torch's headers, where they are not in this environment.
    CMAKE_ARGS          more arguments for CMake.
    MAX_JOBS            how many files compile at once.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC_MODE = os.environ.get("STEER_CSRC", "AUTO").upper()
if CSRC_MODE not in ("AUTO", "ON", "OFF"):
    raise SystemExit(f"STEER_CSRC must be AUTO, ON or OFF, got {CSRC_MODE}")


class MissingTool(Exception):
    """What the C++ library cannot be built without; the message says how to get it."""


def find_tool(*names: str) -> str | None:
    """The first of the programs on PATH or beside this Python, where pip puts cmake and ninja."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    return next(filter(None, (shutil.which(name, path=folders) for name in names)), None)


def find_torch_include() -> Path:
    """Torch's headers: those named, else of the importable torch, else of the environment that
    runs pip (whose build isolation hides torch).
    """
    candidates = []
    if "TORCH_INCLUDE_DIR" in os.environ:
        candidates.append(Path(os.environ["TORCH_INCLUDE_DIR"]))
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        candidates.append(Path(spec.origin).parent / "include")
    candidates.append(Path(sysconfig.get_path("platlib")) / "torch" / "include")
    for folder in candidates:
        if (folder / "torch" / "csrc" / "stable" / "library.h").is_file():
            return folder
    raise MissingTool("Torch's headers (pip install torch first, or set TORCH_INCLUDE_DIR)")


class CMakeBuild(build_ext):
    """Calls CMake instead of a compiler.

    The library uses no Python symbol, so its name has no interpreter tag.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self.run_cmake(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except (MissingTool, subprocess.CalledProcessError) as error:
            is_missing = isinstance(error, MissingTool)
            reason = f"no {error}" if is_missing else "CMake failed, see its messages above"
            if CSRC_MODE == "ON":
                raise SystemExit(f"STEER_CSRC=ON, but csrc cannot be built: {reason}") from error
            message = f"steer_engine: csrc is left out, PyTorch serves instead: {reason}"
            print(message, file=sys.stderr)

    def run_cmake(self, output: Path) -> None:
        cmake = find_tool("cmake")
        if cmake is None:
            raise MissingTool("CMake (pip install cmake)")
        if "CXX" not in os.environ and find_tool("c++", "g++", "clang++") is None:
            raise MissingTool("C++ compiler (install g++, or set CXX)")
        include = find_torch_include()
        ninja = find_tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [cmake, "-S", str(ROOT), "-B", str(build), *generator]
        configure.append(f"-DTORCH_INCLUDE_DIR={include}")
        configure.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}")
        subprocess.run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


class AnyPythonWheel(bdist_wheel):
    """The wheel depends on the platform but on no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # kernels/ is installed as steer_engine.kernels: plain `kernels` is another published package.
    packages=[
        "steer_engine",
        *(f"steer_engine.{name}" for name in find_packages(str(ROOT / "steer_engine"))),
        "steer_engine.kernels",
        "steer_engine.kernels.reference",
    ],
    package_dir={
        "steer_engine.kernels": "kernels",
        "steer_engine.kernels.reference": "kernels/reference",
    },
    package_data={
        "steer_engine.embedded": ["*", "base/*", "domain/*"],
        "steer_engine.report": ["template.html.j2", "report.css", "report.js"],
    },
    # optional: an editable install accepts that the file is not there.
    ext_modules=[]
    if CSRC_MODE == "OFF"
    else [Extension("steer_engine._csrc", sources=[], optional=CSRC_MODE == "AUTO")],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
