"""What tests need to configure and build csrc by themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def find_tool(name: str) -> str:
    """A program on PATH or beside this Python, where pip puts cmake and ninja; or skip."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def configure_command(folder: Path, *options: str) -> list:
    """The command that configures csrc in a build folder; skips where a tool is missing."""
    tools = [find_tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja"]
    return [*tools, f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", "--no-warn-unused-cli", *options]


def run(command: list, **arguments) -> str:
    """Standard output and error together; fails with their end if the command does."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **arguments
    )
    if done.returncode != 0:
        pytest.fail(f"exit {done.returncode} of {command}:\n{done.stdout[-12000:]}", pytrace=False)
    return done.stdout
