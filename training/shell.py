"""Commands for people to copy: what is printed runs as it is printed, where it is printed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python() -> str:
    """`python` where a shell finds this interpreter by that name, else its path."""
    found = shutil.which("python")
    here = Path(sys.executable)
    if found is not None and Path(found).parent == here.parent and os.path.samefile(found, here):
        return "python"
    return sys.executable


def near(path: str | Path) -> str:
    """A path as short as it can be typed here: relative below the working directory."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def command(script: str | Path, arguments: Sequence[str], *, launcher: Sequence[str] = ()) -> str:
    """One line of shell that runs a script of ours; launcher: words of torchrun's module."""
    return shlex.join([python(), *launcher, near(script), *arguments])
