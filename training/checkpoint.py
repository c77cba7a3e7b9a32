"""Checkpoints: written so that no moment can lose one, read so that no file can lie or run code.

Writing goes to a temporary file in the same folder, which is flushed to the disk before it takes
the checkpoint's name; whoever kills the process, pulls the plug or fills the disk leaves the old
file or the new one, whole. Reading first verifies the checksums of the zip container (torch.load
does not), then admits tensors and plain values only. The reference's own checkpoints and block
masks are read too.

L layers, nb blocks along one side of the score matrix, d head_dim, G GPUs of a published run.
"""

import contextlib
import errno
import fcntl
import io
import os
import pickle
import re
import secrets
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_MODEL_KEYS = frozenset(
    ("model_state_dict", "phase", "block_masks", "config", "step", "best_accuracy")
)
_PLAIN_TYPES = (str, int, float, bool, type(None), torch.Tensor, torch.nn.Parameter)
# The published masks carry the name of a parameter where the run's name belongs (a slip of the
# reference).
_SLIP_NAME = "module.seq_classifer.mlpblock.2.bias"


class CheckpointError(ValueError):
    """A checkpoint or mask file cannot be read or written; the message is one sentence."""


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
            raise ValueError(
                f"a run's name becomes part of file names, which {self.name!r} cannot"
            )
        object.__setattr__(self, "output_dir", Path(self.output_dir))

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
        return _masks_path(self.output_dir, self.task, self.name, self.random)

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


def save_masks(path: str | Path, block_masks: torch.Tensor) -> None:
    """Write bool [L, nb, nb] as the reference does: a pickled float tensor [1, L, nb, nb], on the
    CPU.

    Raises: CheckpointError as `save_checkpoint`.
    """
    masks = block_masks.detach().to("cpu", torch.float32)[None].clone()
    replace_file(Path(path), lambda sink: sink.write(pickle.dumps(masks, protocol=4)))


def remove_stale_temporaries(path: str | Path) -> None:
    """Remove the temporary files for `path` that no living process is writing."""
    path = Path(path)
    for temporary in path.parent.glob(f".{_glob_escape(path.name)}.*.saving"):
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                # The writer holds this lock; the system drops it when the writer dies, however it
                # dies.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(descriptor)


class _Sink:
    """The file torch.save writes to.

    It keeps the first OSError for later instead of raising it: torch's C++ writer turns an
    exception of its sink into a RuntimeError without the errno, so "disk full" could not be told
    from a bug.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:
            self.error = error
        return size

    def flush(self) -> None:
        pass  # nothing is buffered here


def replace_file(path: Path, write: Callable[[_Sink], Any], previous: Path | None = None) -> None:
    """Have `write` produce a file that takes the place of `path` at once, or not at all.

    write: is given an object with a method write(bytes).
    previous: where the whole checkpoint that `path` was stays.
    Raises: CheckpointError if the disk is full, the folder is not writable, ...
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.saving")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sink = _Sink(descriptor)
            write(sink)
            if sink.error is not None:
                raise sink.error
            os.fsync(descriptor)
            # a damaged file must not push out the good one before it
            if previous is not None and path.exists() and _is_whole(path):
                _keep_as(path, previous)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(descriptor)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the file of that name is unchanged" if path.exists() else ""
        reason = error.strerror or error
        raise CheckpointError(f"could not save {path}: {reason}{kept}") from error


def _keep_as(path: Path, previous: Path) -> None:
    """Give the file at `path` the name `previous` too: both names are whole at every moment."""
    link = path.with_name(f".{previous.name}.{secrets.token_hex(4)}.saving")
    try:
        os.link(path, link)
    except OSError:
        # No hard links here (FAT, some network file systems): for a moment only `previous` exists,
        # and load_last_checkpoint finds it.
        os.replace(path, previous)
        return
    try:
        os.replace(link, previous)
    finally:
        # A rename onto another name of the same file does nothing and leaves both names.
        link.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            _verify_checksums(file)
        return True
    except Exception:  # a damaged zip can raise almost anything
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _glob_escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


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
        found = f"its keys are {_some(content)}" if isinstance(content, dict) else "no dict"
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
        raise CheckpointError(f"{path} has missing or unknown entries: {_some(wrong)}")
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

    Going back is said through `notify`. Nothing is written: several processes may do this at once.

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


def load_masks(path: str | Path) -> torch.Tensor:
    """Read a `mat_lst` pickle, ours or the reference's: [G, L, nb, nb] -> bool [L, nb, nb].

    Raises: CheckpointError, also when the pickle asks for anything but a tensor (nothing is
    executed).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            masks = _MaskUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"there is no file of block masks {path}") from None
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    except _ForbiddenError as error:
        raise CheckpointError(f"{path} wants {error}, which block masks never need") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(f"{path} is damaged or no pickle of block masks") from error
    if (
        not isinstance(masks, torch.Tensor)
        or masks.dim() != 4
        or masks.shape[2] != masks.shape[3]
        or masks.numel() == 0
    ):
        shape = list(masks.shape) if isinstance(masks, torch.Tensor) else type(masks).__name__
        raise CheckpointError(
            f"{path} holds {shape} where masks [GPUs, layers, blocks, blocks] belong"
        )
    kept = masks == 1
    if not bool((kept | (masks == 0)).all()):
        raise CheckpointError(f"{path} holds values other than 0 and 1: not block masks")
    if not bool((kept == kept[0]).all()):
        raise CheckpointError(f"the copies in {path}, one per GPU, differ from each other")
    return kept[0].clone()


def find_masks(root: str | Path, task: str, name: str, random: int | str) -> tuple[Path, bool]:
    """The mask pickle of a run below `root`: its path, and whether it carries the published slip
    name.

    Raises: CheckpointError naming both places if there is none.
    """
    regular = _masks_path(Path(root), task, name, random)
    slip = _masks_path(Path(root), task, _SLIP_NAME, random)
    for path in (regular, slip):
        if path.is_file():
            return path, path == slip
    raise CheckpointError(f"there are no block masks {regular}, nor {slip.name} beside it")


def mask_agreement(
    model_state_dict: dict[str, torch.Tensor], block_masks: torch.Tensor
) -> list[float]:
    """How well masks go with the weights: per layer, the share of a mask's blocks that the layer's
    own pattern would choose, 0..1.

    block_masks: bool [L, nb, nb]. A tied model's one pattern is compared with every layer's mask.
    Source: docs/semantics.md, "Choice of blocks".
    """
    patterns = _patterns(model_state_dict)
    shares = []
    for layer, mask in enumerate(block_masks.cpu()):
        pattern = patterns[min(layer, len(patterns) - 1)].double()
        count = int(mask.sum())
        order = torch.sort((pattern @ pattern.T).flatten(), descending=True, stable=True).indices
        shares.append(float(mask.flatten()[order[:count]].double().sum()) / max(count, 1))
    return shares


def check_fits(path: str | Path, state: TrainState, expected: dict[str, torch.Tensor]) -> None:
    """Refuse a checkpoint whose weights do not go into the model at hand.

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
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            try:
                _verify_checksums(file)
            except Exception as error:  # a damaged zip can raise almost anything
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
                forbidden = _forbidden_name(error)
                if forbidden is not None:
                    reason = f"wants to use {forbidden}"
                else:
                    reason = "is no torch file of tensors and plain values"
                raise CheckpointError(f"{path} {reason}: not a checkpoint") from error
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}{_existing_remark(path)}") from None
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error


def _verify_checksums(file: Any) -> None:
    """Read the whole zip against its CRCs, which torch.load does not look at. Raises whatever is
    wrong.

    What no CRC covers (headers, padding) either does not reach the loaded values or breaks the
    zip: the tests flip every such bit.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) != len(records):
            raise zipfile.BadZipFile("two records of one name")
        for record in records:
            stored = record.compress_type == zipfile.ZIP_STORED
            if not stored or record.file_size != record.compress_size:
                raise zipfile.BadZipFile("torch stores its records as they are")
            # One flipped bit makes a record a folder for torch's reader, which then leaves the
            # tensor's memory as it happens to be; Python's zipfile does not look at that bit.
            if record.external_attr & 0x10:
                raise zipfile.BadZipFile("torch writes no folders")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("checksum")


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
    if "model.embeddings.word_embeddings.weight" not in weights or not _patterns(weights):
        raise CheckpointError(
            f"{path} holds another kind of model, with parameters such as {_some(weights)}"
        )


def _check_masks_fit(
    masks_origin: str | Path, masks: torch.Tensor, path: Path, weights: dict[str, torch.Tensor]
) -> None:
    patterns = _patterns(weights)
    layers, blocks = masks.shape[0], masks.shape[1]
    if len(patterns) not in (1, layers) or blocks != patterns[0].shape[0]:
        raise CheckpointError(
            f"the block masks in {masks_origin} are for {layers} layers of {blocks} blocks, "
            f"the model in {path} has {len(patterns)} of {patterns[0].shape[0]}"
        )


def _patterns(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The `pattern` [nb, d] of every layer, in order (one if the layers are tied)."""
    found = {}
    for name, value in weights.items():
        match = re.fullmatch(r"model\.transformer(?:_(\d+))?\.mha\.pattern", str(name))
        if match:
            found[int(match[1] or 0)] = value
    return [found[layer] for layer in sorted(found)]


def _masks_path(root: Path, task: str, name: str, random: int | str) -> Path:
    return root / "pickle" / f"layer_attn-{random}" / f"mat_lst_{task}_{name}.pickle"


def _some(names: Any) -> str:
    listed = sorted(str(name) for name in names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") if listed else "none"


def _forbidden_name(error: Exception) -> str | None:
    """The class or function that torch's weights_only refused, if that is what `error` says."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found and isinstance(error, pickle.UnpicklingError) else None


class _ForbiddenError(pickle.UnpicklingError):
    pass


class _MaskUnpickler(pickle.Unpickler):
    """Rebuilds one tensor and nothing else.

    The three names below are all that a pickled tensor needs. Each is answered with a fresh object
    rather than with torch's own function, whose attributes a crafted pickle could otherwise
    overwrite.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _tensor(storage, offset, size, stride)
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: _storage(data)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: OrderedDict()  # of backward hooks: always empty
        raise _ForbiddenError(f"to use {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError("something from outside the file")


def _storage(data: Any) -> Any:
    """Read what torch.storage puts into pickles: a torch file inside the pickle."""
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = _forbidden_name(error)
        if forbidden is None:
            raise
        raise _ForbiddenError(f"to use {forbidden}") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("not a storage")
    return storage


def _tensor(storage: Any, offset: int, size: Any, stride: Any) -> torch.Tensor:
    # set_ refuses what lies outside the storage; a stride of 0 could still make little data huge.
    tensor = torch.empty(0, dtype=storage.dtype).set_(
        storage._untyped_storage, offset, size, stride
    )
    if tensor.nbytes > storage._untyped_storage.nbytes():
        raise pickle.UnpicklingError("more elements than the storage has")
    return tensor
