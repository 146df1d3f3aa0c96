"""Digits of small alphabets on one ANS stack: docs/wire-format.md, "ANS stream". constriction does the coding.

Groups of digits are coded as one symbol of an alphabet of at most 256, which makes coding a digit several times faster
than one by one and loses less than 0.1 % to rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import MessageEntropyError
from fstq_infer.lazy import load

TOTAL_BITS, WEIGHT_BITS, GROUP, ALPHABET = 12, 20, 8, 256
TOTAL = 1 << TOTAL_BITS


def _stream() -> Any:
    return load("constriction:stream", "coding federated messages", "federated")


def frequencies(symbols: NDArray[np.uint8], alphabet: int) -> NDArray[np.int64]:
    """(alphabet,) integers that sum to 4096, near the shares of each symbol; one that occurs has at least 1.

    symbols: (n,), n > 0. Integer arithmetic, so that every machine finds the same.
    """
    counts = np.bincount(symbols, minlength=alphabet).astype(np.int64)
    shares = (2 * TOTAL * counts + len(symbols)) // (2 * len(symbols))
    shares = np.maximum(shares, counts > 0)
    missing = TOTAL - int(shares.sum())
    shares[np.argmax(shares)] += max(missing, 0)
    for _ in range(-missing):  # less than one for each symbol; taken where it is missed least
        shares[np.argmax(shares)] -= 1
    return shares


def share(count: int, size: int) -> NDArray[np.int64]:
    """(2,) frequencies of the bits of a bitmap with ``count`` ones among ``size``."""
    ones = min(max((2 * TOTAL * count + size) // (2 * size), 1), TOTAL - 1)
    return np.array([TOTAL - ones, ones], np.int64)


def group(alphabet: int) -> int:
    """Digits coded as one symbol: the largest g <= 8 with alphabet^g <= 256."""
    return next(g for g in range(GROUP, 0, -1) if alphabet**g <= ALPHABET)


def weights(frequency: NDArray[np.int64], digits: int) -> NDArray[np.int64]:
    """(A^digits,) integers >= 1 that sum to 2^20: the weight of each group of digits."""
    found = np.array([1 << WEIGHT_BITS], np.int64)
    for _ in range(digits):
        found = ((found[:, None] * frequency) >> TOTAL_BITS).reshape(-1)
    found = np.maximum(found, 1)
    found[np.argmax(found)] += (1 << WEIGHT_BITS) - found.sum()
    return found


def _model(frequency: NDArray[np.int64], digits: int) -> Any:
    # Weights over 2^20 are exact in binary64, and so is all that constriction computes from them.
    return _stream().model.Categorical(weights(frequency, digits) / (1 << WEIGHT_BITS), perfect=False)


@lru_cache(maxsize=32)
def _digits(alphabet: int, digits: int) -> NDArray[Any]:
    """(A^digits,) the digits of each group, as one item of ``digits`` bytes."""
    groups = np.arange(alphabet**digits)
    columns = [(groups // alphabet**place % alphabet).astype(np.uint8) for place in reversed(range(digits))]
    return np.stack(columns, axis=1).view(f"V{digits}").reshape(-1)


class Encoder:
    """Takes arrays of digits in the order in which they will be decoded; :meth:`words` codes them."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.uint8], NDArray[np.int64]]] = []

    def push(self, digits: NDArray[np.uint8], frequency: NDArray[np.int64]) -> None:
        """(n,) digits of the alphabet that ``frequency`` (A,) describes."""
        self._parts.append((digits, frequency))

    def words(self) -> NDArray[np.uint32]:
        """The ANS words of everything pushed."""
        if not self._parts:
            return np.empty(0, np.uint32)
        coder = _stream().stack.AnsCoder()
        for digits, frequency in reversed(self._parts):  # a stack: the last is decoded first
            alphabet = len(frequency)
            size = group(alphabet)
            whole = len(digits) // size * size
            if whole < len(digits):
                coder.encode_reverse(digits[whole:].astype(np.int32), _model(frequency, 1))
            if whole:
                coder.encode_reverse(_join(digits[:whole], alphabet, size), _model(frequency, size))
        words: NDArray[np.uint32] = coder.get_compressed()
        return words


def _join(digits: NDArray[np.uint8], alphabet: int, size: int) -> NDArray[np.int32]:
    if alphabet == 2:
        return np.packbits(digits).astype(np.int32)
    columns = digits.reshape(-1, size)
    joined = columns[:, 0].copy()
    for column in range(1, size):
        joined *= np.uint8(alphabet)
        joined += columns[:, column]
    return joined.astype(np.int32)


class Decoder:
    """Gives back the digits of an :class:`Encoder`. Raises MessageEntropyError when the words cannot be such."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        if len(words) and not words[-1]:
            raise MessageEntropyError("the last entropy-coded word is 0, which no encoder writes. Have it sent again.")
        self._coder = _stream().stack.AnsCoder(words) if len(words) else None

    def pop(self, count: int, frequency: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The next (count,) digits, count > 0."""
        if self._coder is None:
            self._coder = _stream().stack.AnsCoder()
        alphabet = len(frequency)
        size = group(alphabet)
        whole, rest = divmod(count, size)
        parts: list[NDArray[np.uint8]] = []
        if whole:
            joined = self._coder.decode(_model(frequency, size), whole)
            parts.append(_digits(alphabet, size).take(joined).view(np.uint8))
        if rest:
            parts.append(self._coder.decode(_model(frequency, 1), rest).astype(np.uint8))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def finish(self) -> None:
        """Raises MessageEntropyError unless all words have been used."""
        if self._coder is not None and not self._coder.is_empty():
            raise MessageEntropyError(
                "the entropy-coded words do not end with the last symbol, expected an empty coder. Have it sent again."
            )
