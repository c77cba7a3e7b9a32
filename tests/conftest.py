"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real pictures, reviews and published checkpoints that some tests read."""
    folder = os.environ.get("SAT_TEST_DATA")
    if not folder:
        pytest.skip("SAT_TEST_DATA is not set: the real data and published checkpoints are absent")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"SAT_TEST_DATA={folder} is not a folder")
    return path
