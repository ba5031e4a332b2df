"""Values of GGUF are those of gguf's own dequantiser, in float32, whatever rows are asked for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from pymerge.checkpoint import decoded as decoded_module
from pymerge.checkpoint.decoded import DecodedEntry, decoded
from pymerge.checkpoint.gguf.decoder import GGUFDecoder
from pymerge.checkpoint.gguf.layout import Encoding, encoding
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry

TYPES = [kind for kind in GGMLQuantizationType if isinstance(encoding(kind), Encoding)]
ROWS, COLUMNS = 24, 512


def entry_of(
    file: Path, kind: GGMLQuantizationType, rows: int = ROWS, columns: int = COLUMNS, **changes: int | float | bool
) -> tuple[DecodedEntry, NDArray[np.float32], dict[Path, tuple[int, int]]]:
    """A matrix of random codes in a file, behind other bytes; and its values by gguf."""
    block, nbytes = GGML_QUANT_SIZES[kind]
    row_bytes = columns // block * nbytes
    codes = np.random.default_rng(int(kind)).integers(0, 256, (rows, row_bytes), dtype=np.uint8)
    file.write_bytes(b"before" + codes.tobytes() + b"after")
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(codes, kind)
    place = TensorEntry("x", "U8", (rows, row_bytes), file, len(b"before"), codes.nbytes)
    size = (columns, rows) if changes.get("transposed") else (rows, columns)
    entry = decoded("x", GGUFDecoder(place, int(kind), size, **changes), "BF16")  # type: ignore[arg-type]
    status = file.stat()
    return entry, values, {file: (status.st_size, status.st_mtime_ns)}


def same(left: bytes | bytearray, right: NDArray[np.float32]) -> bool:
    """Bit for bit: random codes stand for NaN, too."""
    return bytes(left) == np.ascontiguousarray(right, np.float32).tobytes()


def test_no_type_of_the_package_is_left_out() -> None:
    names = {kind.name for kind in TYPES}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K"} <= names
    assert {"Q6_K", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4"} <= names


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_values_are_those_of_gguf_in_any_rows(
    kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_module, "CHUNK_ELEMENTS", 5 * COLUMNS)  # so that reads are cut
    entry, values, stamps = entry_of(tmp_path / "x.gguf", kind)
    with Reader(stamps) as reader:
        for start, stop in ((0, ROWS), (0, 1), (7, 8), (3, 20), (ROWS - 1, ROWS), (4, 4)):
            assert same(reader.read_bytes(entry, start, stop), values[start:stop]), (start, stop)
            assert same(reader.read_bytes(entry.rows(start, stop)), values[start:stop])


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K, GGMLQuantizationType.F16])
@pytest.mark.parametrize("heads", [1, 2, 6, 12])
def test_rows_of_heads_in_their_order(heads: int, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    entry, values, stamps = entry_of(tmp_path / "x.gguf", kind, heads=heads)
    # llama.cpp has made (head, half, i) into (head, i, half).
    wanted = values.reshape(heads, -1, 2, COLUMNS).swapaxes(1, 2).reshape(ROWS, COLUMNS)
    with Reader(stamps) as reader:
        for start in range(ROWS):
            for stop in range(start, ROWS + 1):
                assert same(reader.read_bytes(entry, start, stop), wanted[start:stop]), (start, stop)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q3_K, GGMLQuantizationType.F32])
def test_columns_in_place_of_rows(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    entry, values, stamps = entry_of(tmp_path / "x.gguf", kind, transposed=True)
    with Reader(stamps) as reader:
        for start, stop in ((0, COLUMNS), (0, 1), (31, 33), (255, 257), (100, 101), (COLUMNS - 1, COLUMNS)):
            assert same(reader.read_bytes(entry, start, stop), values.T[start:stop]), (start, stop)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0])
def test_vectors(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    block, nbytes = GGML_QUANT_SIZES[kind]
    file = tmp_path / "x.gguf"
    codes = np.random.default_rng(0).integers(0, 250, (COLUMNS // block, nbytes), dtype=np.uint8)
    file.write_bytes(codes.tobytes())
    place = TensorEntry("x", "U8", codes.shape, file, 0, codes.nbytes)
    entry = decoded("x", GGUFDecoder(place, int(kind), (COLUMNS,), shift=-1.0), "BF16")
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(codes, kind).reshape(-1) - np.float32(1)
    status = file.stat()
    with Reader({file: (status.st_size, status.st_mtime_ns)}) as reader:
        for start, stop in ((0, COLUMNS), (0, 1), (31, 33), (100, 164), (COLUMNS - 1, COLUMNS)):
            assert same(reader.read_bytes(entry, start, stop), values[start:stop]), (start, stop)


def test_kind_and_bytes_for_people(tmp_path: Path) -> None:
    entry, _, _ = entry_of(tmp_path / "x.gguf", GGMLQuantizationType.Q4_K)
    assert entry.decoder.kind == "GGUF Q4_K"
    assert (entry.dtype, entry.shape, entry.output_dtype) == ("F32", (ROWS, COLUMNS), "BF16")
    assert entry.stored_bytes == ROWS * COLUMNS // 256 * 144
