"""Digests of tensors: by parts, whatever pieces they come in and whoever hashes them when."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pymerge.output import digests
from pymerge.output.digests import PART_BYTES, Digest, Hashing

SIZES = [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES, 6 * PART_BYTES + 77]
# Ends of the last part: whole blocks of 64 bytes, and what still has room, or not, for the padding behind it.
ENDS = [1, 55, 56, 63, 64, 65, 119, 120, PART_BYTES - 64, PART_BYTES - 9, PART_BYTES - 1, PART_BYTES]


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


@pytest.mark.parametrize("parts", [4, 5, 6, 8, 9, 12, 16, 17, 21, 37])
def test_parts_that_are_hashed_together(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each count of lanes, all in use or not, in memory that may be written and that may not."""
    data = np.random.default_rng(parts).bytes(parts * PART_BYTES)
    for end in ENDS:
        some = data[: (parts - 1) * PART_BYTES + end]
        wanted = expected(some)
        for memory in (some, bytearray(some)):
            digest = Digest(len(some))
            digest.update(memoryview(memory))
            assert digest.hexdigest() == wanted, end
    monkeypatch.setattr(digests, "_has_native", lambda: False)
    digest = Digest(len(data))
    digest.update(memoryview(data))
    assert digest.hexdigest() == expected(data)


def test_the_extension_says_which_parts_it_has_hashed() -> None:
    part_digests = pytest.importorskip("pymerge.backends.native.part_digests").part_digests
    data = np.random.default_rng(3).bytes(9 * 128 + 5)
    found = bytearray(32 * 10)
    done = part_digests(memoryview(found), memoryview(data), 128)
    assert 0 <= done <= 10
    parts = [hashlib.sha256(data[at : at + 128]).digest() for at in range(0, len(data), 128)]
    assert bytes(found) == b"".join(parts[:done]) + bytes(32 * (10 - done))
    with pytest.raises(ValueError, match="parts of 100 bytes, no multiple of 64"):
        part_digests(memoryview(found), memoryview(data), 100)


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
    digest = Digest(40 * PART_BYTES)
    tasks = digest.take(memoryview(bytes(40 * PART_BYTES)))
    assert [task.nbytes for task in tasks] == [16 * PART_BYTES, 16 * PART_BYTES, 8 * PART_BYTES]
