"""The byte encoding of lra-text, lra-retrieval, lra-news1 and lra-yelp1: id = byte + 1, 0 pads.

Source: docs/data.md, "Byte encoding"; the ids equal the reference's over all 256 byte values.
"""

import numpy as np


def encode_bytes(text: bytes, *, max_ids: int, length: int) -> np.ndarray:
    """Ids of a text: its first `max_ids` bytes plus one each, then zeros.

    Args:
        text: raw bytes, any values; nothing is decoded, so a cut may fall inside a multi-byte
            character and invalid UTF-8 passes through.
        max_ids: how many bytes are kept at most.
        length: padded length of the model, at least max_ids.
    Returns: int32 [length]; 1..256 at the text (a NUL byte is id 1), 0 behind it.
    """
    if not 0 <= max_ids <= length:
        raise ValueError(f"max_ids {max_ids} does not fit the padded length {length}")
    ids = np.zeros(length, dtype=np.int32)
    count = min(len(text), max_ids)
    np.add(np.frombuffer(text, dtype=np.uint8, count=count), 1, out=ids[:count], dtype=np.int32)
    return ids
