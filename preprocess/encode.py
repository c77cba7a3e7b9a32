"""From a text or a picture to ids."""

import argparse
import functools
import io
from collections.abc import Callable

import numpy as np

from preprocess.sources import Fault, Member


def encode_bytes(max_ids: int, length: int, text: bytes) -> np.ndarray:
    """Ids of a text, int32 [length]: 1..256 for its first `max_ids` bytes (a NUL byte is id 1), 0
    behind them. Nothing is decoded: a cut may fall inside a character, invalid UTF-8 passes
    through. Source: docs/data.md, "Byte encoding"; equals the reference's over all 256 bytes."""
    ids = np.zeros(length, dtype=np.int32)
    count = min(len(text), max_ids)
    np.add(np.frombuffer(text, dtype=np.uint8, count=count), 1, out=ids[:count], dtype=np.int32)
    return ids


def text(max_ids: int, keep_empty: bool = True) -> Callable[[argparse.Namespace], Callable]:
    """Encoder of a Task whose payloads are raw texts, or tuples of texts, of which `max_ids` bytes
    are kept. keep_empty: an empty text is an example (padding only, as TFDS has it), no fault."""
    return lambda options: functools.partial(
        _text, min(max_ids, options.padded_length), options.padded_length, keep_empty
    )


def _text(max_ids: int, length: int, keep_empty: bool, text: bytes | tuple[bytes, ...]):
    if isinstance(text, tuple):
        return [encode_bytes(max_ids, length, part) for part in text]
    ids = encode_bytes(max_ids, length, text)
    if not text:
        if not keep_empty:
            raise Fault("the text is empty")
        return ids, {"texts are empty and kept, as in the reference: padding only": 1}
    try:
        text.decode()
    except UnicodeDecodeError:
        return ids, {"texts are not valid UTF-8: their bytes are kept as they are": 1}
    return ids


def gray(rgb: np.ndarray) -> np.ndarray:
    """Gray values of uint8 [..., 3], uint8 [...]: the reference's, bit by bit.
    In float32, rounded after every step: each channel times 1/255, the weighted sum from left to
    right, times 255.5, truncated. Float64 differs on 237 of all 2^24 colours."""
    values = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    tables = [values * np.float32(weight) for weight in (0.2989, 0.5870, 0.1140)]
    total = tables[0][rgb[..., 0]]
    total += tables[1][rgb[..., 1]]
    total += tables[2][rgb[..., 2]]
    total *= np.float32(255.5)
    return total.astype(np.uint8)


def picture(
    payload: bytes | Member,
    decode: Callable,
    largest: int | None = None,
    formats: list[str] | None = None,
) -> np.ndarray:
    """decode(open picture) of a picture file of at most `largest` bytes. Raises Fault.

    What the system refuses while the file is read, or for lack of memory, is no fault of the
    picture: OSError, MemoryError. Whatever the decoder does with a broken file is."""
    from PIL import Image  # tasks of texts do without

    data = payload if isinstance(payload, bytes) else payload.read(largest)
    if not data:
        raise Fault("the picture file is empty", always=True)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as opened:
            return decode(opened)
    except (Fault, MemoryError):
        raise
    except Exception as error:
        raise Fault("the picture is cut off or cannot be decoded") from error


def pixels(values: np.ndarray) -> np.ndarray:
    """Ids of gray values uint8 [...], in rows: int32 [n]."""
    return values.reshape(-1).astype(np.int32)
