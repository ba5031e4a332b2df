"""Philox 4x32-10, a counter-based generator: each number is a function of key and place, on every device the same.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. csrc/common/philox.h gives
the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter of four 32-bit words, as int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32
    for _ in range(_ROUNDS):
        # Products wrap around as signed numbers; their 64 bits are the same.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(second) ^ c1 ^ k0, second & _WORD, _high(first) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def uniform_words(key: int, begin: int, end: int, device: torch.device) -> Tensor:
    """The 32-bit numbers of elements `begin` (a multiple of 4) to `end`, as int64: element i is word i % 4 of counter
    i // 4.
    """
    import torch

    place = torch.arange(begin // 4, -(-end // 4), dtype=torch.int64, device=device)
    zero = torch.zeros_like(place)
    words = torch.stack(philox((place & _WORD, place >> 32, zero, zero), key), dim=1)
    return words.view(-1)[: end - begin]


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD
