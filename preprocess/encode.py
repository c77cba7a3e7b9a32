"""From a text or a picture to ids."""

import argparse
import functools
import io
from collections.abc import Callable

import numpy as np

from preprocess.sources import Fault, Member

# ---- bytes: id = byte + 1, 0 pads ---------------------------------------------------------------


def encode_bytes(max_ids: int, length: int, text: bytes) -> np.ndarray:
    """Ids of a text: its first `max_ids` bytes plus one each, then zeros.

    Args:
        max_ids: how many bytes are kept at most.
        length: padded length of the model, at least max_ids.
        text: raw bytes, any values; nothing is decoded, so a cut may fall inside a multi-byte
            character and invalid UTF-8 passes through.
    Returns: int32 [length]; 1..256 at the text (a NUL byte is id 1), 0 behind it.
    Source: docs/data.md, "Byte encoding"; the ids equal the reference's over all 256 byte values.
    """
    ids = np.zeros(length, dtype=np.int32)
    count = min(len(text), max_ids)
    np.add(np.frombuffer(text, dtype=np.uint8, count=count), 1, out=ids[:count], dtype=np.int32)
    return ids


def text(max_ids: int, keep_empty: bool = True) -> Callable[[argparse.Namespace], Callable]:
    """Encoder of a Task whose payloads are raw texts, of which `max_ids` bytes are kept.

    keep_empty: an empty text is an example (padding only, as TFDS has it), not a fault.
    """
    return lambda options: functools.partial(_text, *_sizes(options, max_ids), keep_empty)


def _sizes(options: argparse.Namespace, max_ids: int) -> tuple[int, int]:
    return min(max_ids, options.padded_length), options.padded_length


def _text(max_ids: int, length: int, keep_empty: bool, text: bytes):
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


def text_pair(max_ids: int) -> Callable[[argparse.Namespace], Callable]:
    """Encoder of a Task whose payloads are (text, text)."""
    return lambda options: functools.partial(_pair, *_sizes(options, max_ids))


def _pair(max_ids: int, length: int, texts: tuple[bytes, bytes]) -> list[np.ndarray]:
    return [encode_bytes(max_ids, length, texts[0]), encode_bytes(max_ids, length, texts[1])]


# ---- pictures -----------------------------------------------------------------------------------


def gray(rgb: np.ndarray) -> np.ndarray:
    """Gray values of uint8 [..., 3], uint8 [...]: the reference's, bit by bit.

    In float32, rounded after every step: each channel times 1/255, the weighted sum from left to
    right, times 255.5, truncated. Float64 differs on 237 of all 2^24 colours.
    """
    red, green, blue = (_channel(rgb[..., i], w) for i, w in enumerate((0.2989, 0.5870, 0.1140)))
    red += green
    red += blue
    red *= np.float32(255.5)
    return red.astype(np.uint8)


def _channel(values: np.ndarray, weight: float) -> np.ndarray:
    """A channel's part of the sum: a table of 256 products."""
    table = np.arange(256, dtype=np.float32) * np.float32(1 / 255) * np.float32(weight)
    return table[values]


def picture(payload: bytes | Member, decode: Callable, largest: int | None = None) -> np.ndarray:
    """Ids of a picture file: decode(open picture) in rows, int32.

    What the system refuses while the file is read, or for lack of memory, is no fault of the
    picture: OSError, MemoryError. Whatever the decoder does with a broken file is.
    """
    data = payload if isinstance(payload, bytes) else payload.read(largest)
    return picture_of(data, decode).reshape(-1).astype(np.int32)


def picture_of(data: bytes, decode: Callable, formats: list[str] | None = None) -> np.ndarray:
    """decode(open picture) of a picture file's bytes. Raises Fault."""
    from PIL import Image  # tasks of texts do without

    if not data:
        raise Fault("the picture file is empty", always=True)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as opened:
            return decode(opened)
    except (Fault, MemoryError):
        raise
    except Exception as error:
        raise Fault("the picture is cut off or cannot be decoded") from error


def pixels(row: np.ndarray) -> np.ndarray:
    """Ids of gray values uint8 [n]."""
    return row.astype(np.int32)
