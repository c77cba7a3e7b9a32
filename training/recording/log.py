"""Where a run's words and numbers go: console, log file, metrics.jsonl, TensorBoard, progress bar.

`RunLog` writes; `NullLog` has the same methods and does nothing (every process but the first).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from training import memory, shell
from training.errors import UserError
from training.recording import files

COMPARED = ("val/accu", "test/accuracy", "test/loss")  # scalars shown with the hyperparameters


class NullLog:
    """Says nothing and writes nothing."""

    def line(self, text: str = "") -> None:
        """One line for people: console and log file."""

    def note(self, text: str) -> None:
        """One line for the log file alone: the console hears it otherwise."""

    def event(self, event: str, **values: Any) -> None:
        """One object for programs: a line of metrics.jsonl."""

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Numbers for TensorBoard; None is left out."""

    def hparams(self, values: dict[str, Any], ended: bool = False) -> None:
        """What TensorBoard compares runs by; again when the run has ended well."""

    def image(self, step: int, tag: str, pixels: Any) -> None:
        """uint8 [height, width, 3] for TensorBoard."""

    def progress(self, step: int, text: str) -> None:
        """Moves the progress bar to `step` completed steps."""

    def sync(self) -> dict[str, int]:
        """Puts everything on disk, so that no checkpoint is ahead of its metrics.

        Returns: `resume_position` for a run that goes on from here.
        """
        return {}

    def close(self) -> None:
        """Flushes and closes everything."""


class RunLog(NullLog):
    """All sinks of one run.

    Args:
        log_path: text log, appended to; None: console alone.
        metrics_path, tensorboard_dir: None in evaluation, which leaves those of the training run
        alone.
        total_steps: of the progress bar, shown on a terminal only; 0: no bar.
        resume_step, resume_position: completed steps of the checkpoint a run goes on from, and
        what `sync` returned for it; what was recorded beyond them is dropped. -1 and None: a run
        that never began, whose curves are left alone.
    """

    def __init__(
        self,
        log_path: Path | None,
        *,
        metrics_path: Path | None = None,
        tensorboard_dir: Path | None = None,
        total_steps: int = 0,
        resume_step: int | None = None,
        resume_position: dict[str, int] | None = None,
    ) -> None:
        self._log: TextIO | None = None
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(log_path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        if metrics_path is not None:
            assert self._log is not None and log_path is not None
            try:
                files.lock(self._log, log_path)
            except BlockingIOError:
                raise UserError(
                    f"another process is training this run (it holds {log_path})"
                ) from None
        self._metrics: TextIO | None = None
        if metrics_path is not None:
            if resume_step is not None:
                drop_events_beyond(metrics_path, resume_step)
            self._metrics = open(metrics_path, "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard: Any = None
        self._bar: Any = None
        self._curves = tensorboard_dir
        if tensorboard_dir is not None:
            purge = None
            if resume_step is not None and resume_position is not None:
                drop_curves_beyond(tensorboard_dir, resume_position)
                purge = resume_step + 1  # for a tensorboard that has read what was dropped
            with self._decoration():
                self._tensorboard = import_tensorboard().SummaryWriter(
                    str(tensorboard_dir), purge_step=purge
                )
        if total_steps and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=resume_step or 0,
                dynamic_ncols=True,
                unit="step",
                bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{remaining}] {desc}",
            )

    @contextlib.contextmanager
    def _decoration(self) -> Iterator[None]:
        """TensorBoard may fail, training may not; but where memory ends, the run ends, to be
        resumed with all its curves."""
        try:
            yield
        except Exception as error:
            if memory.is_exhausted(error):
                raise
            self._tensorboard = None
            self.line(
                f"TensorBoard's curves end here ({type(error).__name__}: {error}); every number "
                f"is in metrics.jsonl"
            )

    def line(self, text: str = "") -> None:
        if self._bar is not None:
            self._bar.clear()
        shell.say(text)
        while shell.lost:
            self.note(f"the console takes no more lines: {shell.lost.pop()}")
        self.note(text)

    def note(self, text: str) -> None:
        if self._log is not None:
            self._log.write(text + "\n")
            self._log.flush()

    def event(self, event: str, **values: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(json.dumps(_finite({"event": event, **values})) + "\n")
            self._metrics.flush()

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        with self._decoration():
            for tag, value in values.items():
                if value is not None and self._tensorboard is not None:
                    self._tensorboard.add_scalar(tag, value, step)

    def hparams(self, values: dict[str, Any], ended: bool = False) -> None:
        if self._tensorboard is None:
            return
        with self._decoration():
            from torch.utils.tensorboard.summary import hparams

            known = {
                name: value if isinstance(value, int | float) else str(value)
                for name, value in values.items()
                if value is not None
            }
            experiment, start, end = hparams(known, dict.fromkeys(COMPARED))
            for summary in (end,) if ended else (experiment, start):
                self._tensorboard.file_writer.add_summary(summary)

    def image(self, step: int, tag: str, pixels: Any) -> None:
        with self._decoration():
            if self._tensorboard is not None:
                self._tensorboard.add_image(tag, pixels, step, dataformats="HWC")

    def progress(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)  # tqdm itself bears a terminal that is gone

    def sync(self) -> dict[str, int]:
        if self._metrics is not None:
            files.sync(self._metrics, self._metrics.name)
        if self._curves is None:
            return {}
        with self._decoration():
            if self._tensorboard is not None:
                self._tensorboard.flush()
        return {path.name: path.stat().st_size for path in _curve_files(self._curves)}

    def close(self) -> None:
        for sink in (self._bar, self._tensorboard, self._metrics, self._log):
            # what is on a full disk's wrong side has been reported when it was written
            with contextlib.suppress(OSError, ValueError):
                if sink is not None:
                    sink.close()


@functools.cache
def import_tensorboard() -> Any:
    """torch.utils.tensorboard, without what it does not need."""
    # tensorboard looks for this module first and, if it is there, leaves tensorflow alone:
    # importing tensorflow takes seconds and hundreds of MB that training has no use for
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    import torch.utils.tensorboard

    # Its writing thread passes an OSError on to the next call as well: once is enough.
    report = threading.excepthook

    def report_others(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_type is not OSError or "tensorboard" not in type(failure.thread).__module__:
            report(failure)

    threading.excepthook = report_others
    return torch.utils.tensorboard


def drop_events_beyond(path: Path, step: int) -> None:
    """Rewrites metrics.jsonl without events later than `step`, without the end of the run, and
    without a torn last line."""
    if not path.exists():
        return
    kept = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a killed run may have written half a line
            if record["event"] != "end" and record.get("step", 0) <= step:
                kept.append(line if line.endswith("\n") else line + "\n")
    write_text(path, "".join(kept))


def drop_curves_beyond(folder: Path, position: dict[str, int]) -> None:
    """Cuts TensorBoard's files back to their sizes in `position` and removes those not in it.

    Its own purge_step cannot do this: it goes by step numbers, and the published val/ curves are
    numbered from 0, so that val/ of the first step to be repeated and train/ of the last step to
    be kept have the same number.
    """
    for path in _curve_files(folder):
        if path.name not in position:
            path.unlink()
        elif path.stat().st_size > position[path.name]:
            os.truncate(path, position[path.name])


def _curve_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def write_text(path: Path, text: str) -> None:
    """Replaces a file by `text` at once: a reader sees the old or the new file, never half of
    one."""
    files.replace_file(path, lambda sink: sink.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    """`value` with null for what is no number: NaN and Infinity are no JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
