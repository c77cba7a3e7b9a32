"""The console: lines that may fail without ending anything, and commands for people to copy,
which run as they are printed, where they are printed."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]


def prepare_streams() -> None:
    """To be called before the first file is opened: a closed console becomes one that swallows
    all, and letters that it does not have are escaped."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # no file of ours gets the number of a closed stream
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


lost: list[str] = []  # why a stream takes no more lines, for a log to tell


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, on stdout if not told otherwise. A closed terminal or pipe and a full device
    end nothing: what is said later is swallowed."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError) as error:
        # so that Python's own flush at its end finds no fault either
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        lost.append(str(error))


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
