"""Checkpoints: written all or nothing, read so that no file can lie or run code.

Reading first verifies the checksums of the zip container (torch.load does not), then admits
tensors and plain values only. The reference's own checkpoints are read too.

L layers, nb blocks along one side of the score matrix.
"""

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training import memory
from training.recording.files import CheckpointError, replace_file, verify_checksums
from training.recording.paths import previous_path
from training.recording.reference_files import forbidden_name, load_masks, patterns_of, some_names

_MODEL_KEYS = frozenset(
    ("model_state_dict", "phase", "block_masks", "config", "step", "best_accuracy")
)


# How torch's old format begins: its magic number, pickled.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PLAIN_TYPES = (str, int, float, bool, type(None), torch.Tensor, torch.nn.Parameter)


@dataclass
class TrainState:
    """What a checkpoint holds.

    model_state_dict: parameter name without "module." -> tensor (on the CPU once loaded).
    phase: "dense" or "sparse".
    block_masks: bool [L, nb, nb], True = kept; None in the dense phase.
    config: plain nested dict of the run's settings; None for a file of the reference, which has
        none. Such a file does not tell its phase either: it counts as sparse if masks were given
        and as dense if not.
    step: completed training steps.
    best_accuracy: best dev accuracy so far, 0..1 (None: not known).
    training: everything else that a resume needs, in .last.model only; tensors, numbers, strings,
        bools, None, lists, tuples and dicts.
    """

    model_state_dict: dict[str, torch.Tensor]
    phase: str
    block_masks: torch.Tensor | None
    config: dict[str, Any] | None
    step: int
    best_accuracy: float | None
    training: dict[str, Any] | None = None


# Writing


def save_checkpoint(path: str | Path, state: TrainState, *, keep_previous: bool = False) -> None:
    """Write `state` to `path`, all or nothing; tensors are streamed from where they are, uncopied.

    With keep_previous the checkpoint that `path` held, if it is whole, stays as
    `previous_path(path)`. Temporary files that killed runs left for this path are removed.

    Raises: CheckpointError if the disk is full, the folder is not writable, ...; `path` then stays
        as it was.
        TypeError if `state` holds something that could not be loaded again: a fault of the caller.
    """
    path = Path(path)
    content = {key: getattr(state, key) for key in sorted(_MODEL_KEYS)}
    # A state_dict is an OrderedDict with version notes as attributes; a plain dict is what gets
    # saved.
    content["model_state_dict"] = dict(state.model_state_dict)
    if state.training is not None:
        content["training"] = state.training
    _require_plain(content, "state")
    replace_file(
        path,
        lambda sink: torch.save(content, sink),  # type: ignore[arg-type]
        previous=previous_path(path) if keep_previous else None,
    )


def _require_plain(value: Any, where: str) -> None:
    """Refuse at saving what `torch.load(weights_only=True)` would refuse when it is too late."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int, float, bool, type(None)):
                raise TypeError(f"{where}: a key of type {type(key).__name__} cannot be saved")
            _require_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    elif type(value) not in _PLAIN_TYPES:
        raise TypeError(f"{where}: a {type(value).__name__} cannot be saved; use plain values")


# Reading


def load_checkpoint(path: str | Path, masks_path: str | Path | None = None) -> TrainState:
    """Read a checkpoint of ours or of the reference; all tensors arrive on the CPU.

    masks_path: a `mat_lst` pickle whose masks take the place of those in the checkpoint (a file of
        the reference has none). The phase is then "sparse".

    Raises: CheckpointError, one sentence, if the file is absent, damaged, foreign, or does not go
        with the masks. Every byte that reaches the result is covered by a checksum.
    """
    path = Path(path)
    content = _load_verified(path)
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        found = f"its keys are {some_names(content)}" if isinstance(content, dict) else "no dict"
        raise CheckpointError(f"{path} holds no model_state_dict ({found}): not a checkpoint")
    if set(content) - {"training"} == _MODEL_KEYS:
        state = TrainState(**content)
        _check_fields(path, state)
    elif "phase" not in content:  # the reference saves the weights alone, from nn.DataParallel
        weights = content["model_state_dict"]
        if all(isinstance(name, str) and name.startswith("module.") for name in weights):
            weights = {name.removeprefix("module."): value for name, value in weights.items()}
        state = TrainState(dict(weights), "dense", None, None, 0, None)
    else:
        wrong = set(content).symmetric_difference(_MODEL_KEYS) - {"training"}
        raise CheckpointError(f"{path} has missing or unknown entries: {some_names(wrong)}")
    _check_weights(path, state.model_state_dict)
    if masks_path is not None:
        state.block_masks = load_masks(masks_path)
        state.phase = "sparse"
    if state.block_masks is not None:
        origin = path if masks_path is None else masks_path
        _check_masks_fit(origin, state.block_masks, path, state.model_state_dict)
    return state


def load_last_checkpoint(path: str | Path, notify: Callable[[str], None] = print) -> TrainState:
    """Read `path` for a resume; if it is damaged or absent, go back to the checkpoint before it.

    `notify` is told about going back. Nothing is written: several processes may do this at once.

    Raises: CheckpointError about `path` if there is no good one before it.
    """
    path = Path(path)
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        previous = previous_path(path)
        try:
            state = load_checkpoint(previous)
        except CheckpointError:
            raise error from None
        notify(f"{error}. Going back to {previous.name}, saved after step {state.step}")
        return state


def check_fits(path: str | Path, state: TrainState, expected: dict[str, torch.Tensor]) -> None:
    """Refuse a checkpoint whose weights do not fit the model.

    expected: `model.state_dict()`.
    Raises: CheckpointError naming the first parameter that differs.
    """
    found = state.model_state_dict
    for name in [*expected, *found]:
        here = list(found[name].shape) if name in found else "absent"
        wanted = list(expected[name].shape) if name in expected else "absent"
        if here != wanted:
            raise CheckpointError(
                f"{path} was made for another task or model: {name} is {here} there, {wanted} here"
            )


def _load_verified(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            head = file.read(len(_LEGACY))
            is_zip = head.startswith(b"PK\x03\x04")
            file.seek(0)
            try:
                verify_checksums(file)
            except Exception as error:  # a damaged zip can raise almost anything
                if memory.is_exhausted(error):
                    raise
                if head == _LEGACY:
                    raise CheckpointError(
                        f"{path} is a torch file of the old format (before torch 1.6), which has "
                        f"no checksums: load it with torch and save it again"
                    ) from error
                if not is_zip and not zipfile.is_zipfile(file):
                    raise CheckpointError(
                        f"{path} is not a checkpoint: not a torch file"
                    ) from error
                raise CheckpointError(
                    f"{path} is truncated or damaged{_previous_remark(path)}"
                ) from error
            file.seek(0)
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                if memory.is_exhausted(error):
                    raise
                forbidden = forbidden_name(error)
                if forbidden is not None:
                    reason = f"wants to use {forbidden}"
                else:
                    reason = "is no torch file of tensors and plain values"
                raise CheckpointError(f"{path} {reason}: not a checkpoint") from error
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}{_existing_remark(path)}") from None
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error


def _previous_remark(path: Path) -> str:
    previous = previous_path(path)
    try:
        state = load_checkpoint(previous) if previous.exists() else None
    except CheckpointError:
        state = None
    if state is None:
        return ""
    return f"; the checkpoint before it, {previous}, saved after step {state.step}, is good"


def _existing_remark(path: Path) -> str:
    existing = sorted(p.name for p in path.parent.glob("*.model"))
    if not existing:
        return ", nor any other in its folder"
    return f"; that folder has {', '.join(existing)}"


def _check_fields(path: Path, state: TrainState) -> None:
    masks = state.block_masks
    good = (
        state.phase in ("dense", "sparse")
        and (masks is not None) == (state.phase == "sparse")
        and (
            masks is None
            or (
                isinstance(masks, torch.Tensor)
                and masks.dtype == torch.bool
                and masks.dim() == 3
                and masks.shape[1] == masks.shape[2]
            )
        )
        and isinstance(state.config, dict)
        and type(state.step) is int
        and isinstance(state.best_accuracy, (float, int, type(None)))
        and isinstance(state.training, (dict, type(None)))
    )
    if not good:
        raise CheckpointError(f"{path} has entries of the wrong type: not a checkpoint of ours")


def _check_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    if not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} has something other than tensors in its model_state_dict")
    if "model.embeddings.word_embeddings.weight" not in weights or not patterns_of(weights):
        raise CheckpointError(
            f"{path} holds another kind of model, with parameters such as {some_names(weights)}"
        )


def _check_masks_fit(
    masks_origin: str | Path, masks: torch.Tensor, path: Path, weights: dict[str, torch.Tensor]
) -> None:
    patterns = patterns_of(weights)
    layers, blocks = masks.shape[0], masks.shape[1]
    if len(patterns) not in (1, layers) or blocks != patterns[0].shape[0]:
        raise CheckpointError(
            f"the block masks in {masks_origin} are for {layers} layers of {blocks} blocks, "
            f"the model in {path} has {len(patterns)} of {patterns[0].shape[0]}"
        )
    if len(patterns) == 1 and not bool((masks == masks[0]).all()):
        raise CheckpointError(
            f"the block masks in {masks_origin} differ between layers, which have tied weights in "
            f"{path} and share one mask"
        )
