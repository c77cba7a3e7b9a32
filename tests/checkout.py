"""A copy of the checkout, for tests that need one to themselves."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# beside the tracked files: what git ignores at the top
IGNORED = {"data", "runs", "checkpoints", "pickle", "logs", "shared", ".git"}


def copy_checkout(target: Path) -> Path:
    """The tracked files, as they are now, and the compiled kernels; without git, as in an unpacked
    archive, everything but what runs and tools leave behind."""
    for file in tracked_files():
        if (ROOT / file).exists():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target / file)
    for library in (ROOT / "kernels").glob("*.so"):
        shutil.copy2(library, target / "kernels")
    return target


def tracked_files() -> list[str]:
    """Paths relative to the top."""
    try:
        command = ["git", "ls-files", "-z"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        return list(filter(None, done.stdout.split("\0")))
    except (OSError, subprocess.CalledProcessError):
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
        return ["data/README.md", *(str(path) for path in files if not _is_ignored(path))]


def _is_ignored(path: Path) -> bool:
    top = path.parts[0]
    left_behind = top in IGNORED or top.startswith(".venv") or "_cache" in top
    return left_behind or "__pycache__" in path.parts or path.suffix == ".so"
