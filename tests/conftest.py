"""Fixtures shared by the tests."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest


def pytest_configure(config):
    """Triton's kernels are interpreted on the CPU, but for the tests on a GPU: it looks when it is
    first imported. A run in the background ignores Ctrl-C, and so would what its tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    with suppress(ImportError):
        import triton  # noqa: F401 (imported after TensorFlow it aborts the process)


def possible(item) -> bool:
    """Whether a test's parameters can be together at all."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    # products of bf16 are compiled where the instruction set has them
    if params.get("products") == "bf16" and "bf16" not in params.get("isa", "bf16"):
        return False
    if params.get("isa") == "amx-emulated" and str(params.get("dtype")) == "torch.float32":
        return False  # AMX multiplies bf16
    case = next((value for value in params.values() if hasattr(value, "claims")), None)
    return case is None or case.claims(  # attention_backends.py
        op=params.get("which") if params.get("which") in ("sparse", "dense") else None,
        dtype=params.get("dtype"),
        head_dim=params.get("d"),
        block_size=params.get("bs"),
        tokens=params.get("tokens", 0),
    )


def pytest_collection_modifyitems(items):
    """Combinations of parameters that cannot be are no tests to skip: there are none."""
    items[:] = [item for item in items if possible(item)]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real pictures, reviews and published checkpoints that some tests read."""
    folder = os.environ.get("SAT_TEST_DATA")
    if not folder:
        pytest.skip("set SAT_TEST_DATA to the folder of the real data and published checkpoints")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"SAT_TEST_DATA={folder} is not a folder")
    return path


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where the real data is there, a test that reads it must not skip for another reason."""
    outcome = yield
    report = outcome.get_result()
    if (
        report.skipped
        and os.environ.get("SAT_TEST_DATA")
        and "shared_data" in getattr(item, "fixturenames", ())
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped although SAT_TEST_DATA is set: {report.longrepr}"
