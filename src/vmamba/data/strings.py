"""A compact sequence of many strings."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PackedStrings(Sequence[str]):
    """Strings in one block of bytes: a million of them are two arrays, which forked workers share.

    Args:
        text: The bytes of all strings, concatenated; UTF-8, or whatever bytes the file system has.
        ends: Where each ends, in bytes.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> "PackedStrings":
        encoded = [os.fsencode(name) for name in names]
        return cls(
            np.frombuffer(b"".join(encoded), np.uint8),
            np.cumsum([len(name) for name in encoded], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]].tobytes())
