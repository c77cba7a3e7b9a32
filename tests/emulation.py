"""Compiles kernels with g++ against an emulation of what the machine lacks."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "kernels" / "csrc"
HASHES = ('-DSAT_SOURCE_HASH="emulated"', '-DSAT_BUILD_ID="emulated"')


def build(
    name: str, units: Mapping[Path, list[str]], inputs: Iterable[Path], link: tuple[str, ...]
) -> Path:
    """Compiles each source with its flags and links them, under the build folder.

    inputs: the files that decide whether an earlier build still holds; so do the flags.
    Returns: build/<name>-<hash>/<name>. Skips the test if there is no g++.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    digest = hashlib.sha256(repr([*map(str, units), *units.values(), link]).encode())
    for file in sorted({*inputs, *units}):
        digest.update(file.read_bytes())
    folder = CSRC / "build" / f"{name}-{digest.hexdigest()[:16]}"
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    stamp = f"{os.getpid()}"  # two test runs may build at once
    jobs = []
    for source, flags in units.items():
        output = folder / f"{source.stem}.{stamp}.o"
        command = [compiler, *HASHES, *flags, "-c", source, "-o", output]
        jobs.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), source, output))
    for job, source, _ in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, f"{source.name} does not compile:\n{errors[:4000]}"
    objects = [output for *_, output in jobs]
    linked = folder / f"{name}.{stamp}"
    subprocess.run([compiler, *link, *objects, "-o", linked], check=True)
    linked.replace(target)
    for output in objects:
        output.unlink()
    return target
