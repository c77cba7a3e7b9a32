"""Block masks as the reference writes them: pickles, read without running what is in them.

L layers, nb blocks along one side of the score matrix, G GPUs of a published run.
"""

import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training import memory
from training.recording.files import CheckpointError, replace_file
from training.recording.paths import masks_path_of

# The published masks carry the name of a parameter where the run's name belongs (a slip of the
# reference).
_SLIP_NAME = "module.seq_classifer.mlpblock.2.bias"


def save_masks(path: str | Path, block_masks: torch.Tensor) -> None:
    """Write bool [L, nb, nb] as the reference does: a pickled float tensor [1, L, nb, nb], on the
    CPU.

    Raises: CheckpointError as `save_checkpoint`.
    """
    masks = block_masks.detach().to("cpu", torch.float32)[None].clone()
    replace_file(Path(path), lambda sink: sink.write(pickle.dumps(masks, protocol=4)))


def load_masks(path: str | Path) -> torch.Tensor:
    """Read a `mat_lst` pickle, ours or the reference's: [G, L, nb, nb] -> bool [L, nb, nb].

    A .npy file may hold masks of one's own, [L, nb, nb] or, one for all layers, [nb, nb]
    (returned as [1, nb, nb]).

    Raises: CheckpointError, also when the pickle asks for anything but a tensor (nothing is
    executed).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.suffix == ".npy":
                array = np.load(file, allow_pickle=False)
                masks = torch.from_numpy(
                    array.astype(np.float32).reshape(1, -1, *array.shape[-2:])
                )
            else:
                masks = _MaskUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"there is no file of block masks {path}") from None
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    except _ForbiddenError as error:
        raise CheckpointError(f"{path} wants {error}, which block masks never need") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        if memory.is_exhausted(error):
            raise
        raise CheckpointError(f"{path} is damaged or no file of block masks") from error
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
    regular = masks_path_of(Path(root), task, name, random)
    slip = masks_path_of(Path(root), task, _SLIP_NAME, random)
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
    patterns = patterns_of(model_state_dict)
    shares = []
    for layer, mask in enumerate(block_masks.cpu()):
        pattern = patterns[min(layer, len(patterns) - 1)].double()
        count = int(mask.sum())
        order = torch.sort((pattern @ pattern.T).flatten(), descending=True, stable=True).indices
        shares.append(float(mask.flatten()[order[:count]].double().sum()) / max(count, 1))
    return shares


def patterns_of(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The `pattern` [nb, d] of every layer, in order (one if the layers are tied)."""
    found = {}
    for name, value in weights.items():
        match = re.fullmatch(r"model\.transformer(?:_(\d+))?\.mha\.pattern", str(name))
        if match:
            found[int(match[1] or 0)] = value
    return [found[layer] for layer in sorted(found)]


def some_names(names: Any) -> str:
    listed = sorted(str(name) for name in names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") if listed else "none"


def forbidden_name(error: Exception) -> str | None:
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
        forbidden = forbidden_name(error)
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
