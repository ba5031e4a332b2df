"""Philox 4x32-10, a counter-based generator: each number is a function of key and place, on every device the same.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. csrc/common/philox.h gives
the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Words of 32 bits as int64: a tensor of PyTorch, or an array of numpy.
Words = Any

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Four 32-bit words for each counter of four 32-bit words, of its shape and kind."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32
    for _ in range(_ROUNDS):
        # Products wrap around as signed numbers; their 64 bits are the same.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(second) ^ c1 ^ k0, second & _WORD, _high(first) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def uniform_words(key: int, begin: int, end: int, device: torch.device | None = None) -> Words:
    """The 32-bit numbers of elements `begin` (a multiple of 4) to `end`: element i is word i % 4 of counter i // 4.

    A tensor on the device; without one, an array.
    """
    place, stack = _places(begin // 4, -(-end // 4), device)
    zero = place & 0
    return stack(philox((place & _WORD, place >> 32, zero, zero), key), 1).reshape(-1)[: end - begin]


def _places(begin: int, end: int, device: torch.device | None) -> tuple[Words, Any]:
    """Whole numbers of a range, and the function that puts several such side by side."""
    if device is None:
        import numpy as np

        return np.arange(begin, end, dtype=np.int64), np.stack
    import torch

    return torch.arange(begin, end, dtype=torch.int64, device=device), torch.stack


def _high(product: Words) -> Words:
    return (product >> 32) & _WORD
