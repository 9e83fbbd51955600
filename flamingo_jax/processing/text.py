"""Texts as records of TFDS hold them."""

from typing import Any


def text_of(value: Any) -> str:
    """Decodes a record's text, which TFDS returns as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
