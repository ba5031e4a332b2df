"""Digests of tensors: by parts, whatever pieces they come in and whoever hashes them when."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pymerge.output.digests import PART_BYTES, Digest, Hashing

SIZES = [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES, 6 * PART_BYTES + 77]


def expected(data: bytes) -> str:
    parts = [hashlib.sha256(data[at : at + PART_BYTES]) for at in range(0, len(data), PART_BYTES)]
    if len(parts) < 2:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("piece", [1000, PART_BYTES // 3, PART_BYTES, PART_BYTES + 5, 3 * PART_BYTES, 2**40])
def test_pieces_of_any_size(nbytes: int, piece: int) -> None:
    data = np.random.default_rng(nbytes).bytes(nbytes)
    digest = Digest(nbytes)
    for start in range(0, nbytes, piece):
        digest.update(memoryview(data)[start : start + piece])
    assert digest.hexdigest() == expected(data)


def test_a_tensor_of_one_part_has_its_sha256() -> None:
    data = bytes(range(256)) * 16
    digest = Digest(len(data))
    digest.update(memoryview(data))
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()


def test_threads_hash_in_any_order() -> None:
    data = np.random.default_rng(1).bytes(40 * PART_BYTES + 3)
    digest = Digest(len(data))
    tasks: list[Hashing] = []
    for start in range(0, len(data), 3 * PART_BYTES + 100):
        tasks += digest.take(memoryview(data)[start : start + 3 * PART_BYTES + 100])
    assert sum(task.nbytes for task in tasks) == len(data)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda task: task.run(), reversed(tasks)))
    assert digest.hexdigest() == expected(data)


def test_what_is_begun_is_copied() -> None:
    """The memory of a piece is used again when its own tasks are done: a part that goes on in the next one is kept."""
    data = np.random.default_rng(2).bytes(2 * PART_BYTES)
    digest = Digest(len(data))
    memory = bytearray(PART_BYTES // 2 + 1)
    for start in range(0, len(data), len(memory)):
        piece = data[start : start + len(memory)]
        memory[: len(piece)] = piece
        digest.update(memoryview(memory)[: len(piece)])
    assert digest.hexdigest() == expected(data)


def test_much_is_cut_into_tasks() -> None:
    digest = Digest(16 * PART_BYTES)
    assert [task.nbytes for task in digest.take(memoryview(bytes(16 * PART_BYTES)))] == [4 * PART_BYTES] * 4
