"""Where a run's files lie, named as the reference names them."""

import os
from dataclasses import dataclass
from pathlib import Path

from training.errors import UserError


@dataclass(frozen=True)
class RunPaths:
    """Places of one run's files below `output_dir`, named as the reference names them."""

    output_dir: Path
    random: int
    task: str
    name: str
    mode: str = "train"  # or "eval": which log is written

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name:
            raise UserError(f"a run's name becomes part of file names, which {self.name!r} cannot")
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        longest = len(os.fsencode(f".{self.masks.name}.01234567.saving"))  # while it is written
        if longest > 255:
            raise UserError(
                f"--name {self.name[:20]}...: {longest - 255} bytes too long to become part of "
                f"file names"
            )
        try:
            self.output_dir.exists()
        except OSError as error:
            raise UserError(f"--output_dir {self.output_dir}: {error.strerror}") from None

    @property
    def _checkpoints(self) -> Path:
        return self.output_dir / "checkpoints" / f"checkpoints-{self.random}" / self.task

    @property
    def _logs(self) -> Path:
        return self.output_dir / "logs" / f"log-{self.random}" / self.task

    @property
    def model(self) -> Path:
        return self._checkpoints / f"{self.name}.model"

    @property
    def last(self) -> Path:
        return self._checkpoints / f"{self.name}.last.model"

    @property
    def previous(self) -> Path:
        return previous_path(self.last)

    @property
    def masks(self) -> Path:
        return masks_path_of(self.output_dir, self.task, self.name, self.random)

    @property
    def log(self) -> Path:
        return self._logs / f"{self.mode}.{self.name}.log"

    @property
    def metrics(self) -> Path:
        return self._logs / f"{self.name}.metrics.jsonl"

    @property
    def run_json(self) -> Path:
        return self._logs / f"{self.name}.run.json"

    @property
    def tensorboard(self) -> Path:
        return self._logs / f"{self.name}.tensorboard"


def previous_path(path: Path) -> Path:
    """Where `save_checkpoint(path, ..., keep_previous=True)` keeps the checkpoint before."""
    return path.with_name(path.name.removesuffix(".model") + ".previous.model")


def masks_path_of(root: Path, task: str, name: str, random: int | str) -> Path:
    return root / "pickle" / f"layer_attn-{random}" / f"mat_lst_{task}_{name}.pickle"
