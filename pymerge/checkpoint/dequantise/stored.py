"""Tensors of a checkpoint while quantised ones are looked for among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.decoded import DecodedEntry, Decoder, decoded
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

if TYPE_CHECKING:
    from pymerge.checkpoint.dequantise.numbers import Floats

AGAIN = "download or quantise the model again"
ORIGINAL = "merge the original weights instead"
# Scales of larger tensors are looked at when they are read.
_CHECKED_ELEMENTS = 2**16


class Stored:
    """Stored tensors, and what has been found of them: decoded tensors by the names of their codes, and names of
    tensors that are `gone`, because the values have them in, or `idle`, because they are no part of the weights.

    Args:
        tensors: all of the checkpoint.
        method: quant_method of its config.json; "" without one.
        settings: the quantization_config that says so.
        written: dtype of outputs where nobody chooses one.
        reader: of its files.
    """

    def __init__(
        self, tensors: Mapping[str, TensorEntry], method: str, settings: Mapping[str, Any], written: str, reader: Reader
    ) -> None:
        self.tensors = tensors
        self.method = method
        self.settings = settings
        self.decoded: dict[str, DecodedEntry] = {}
        self.gone: set[str] = set()
        self.idle: set[str] = set()
        self._written = written
        self._reader = reader

    def add(self, name: str, codes: str, decoder: Decoder, *parts: str) -> None:
        """A tensor of this name is decoded, from `codes` and `parts`.

        Raises CheckpointError if it is there as well, or if a plain model has no place for what belongs to it.
        """
        if name != codes and name in self.tensors:
            raise wrong(self.tensors[name], f"is there beside {shorten(codes)}, which is its quantised form")
        smoothed = self.tensors.get(f"{name.rpartition('.')[0]}.pre_quant_scale")
        if smoothed is not None:
            text = f"scales what {shorten(name)} is multiplied with, and the quantised weight is made for that"
            raise wrong(smoothed, text, ORIGINAL)
        self.decoded[codes] = decoded(name, decoder, self._written)
        self.gone.update(parts)

    def bytes_of(self, entry: TensorEntry) -> bytearray:
        """All bytes of a small tensor."""
        return self._reader.read_bytes(entry)

    def check_scales(self, entry: TensorEntry, *, zero: bool = False) -> None:
        """Raise CheckpointError unless scales are finite and not 0 (or `zero`). Large tensors wait for reading."""
        if entry.numel <= _CHECKED_ELEMENTS:
            checked_scales(entry, self.bytes_of(entry), 0, zero=zero)

    def one_scale(self, entry: TensorEntry) -> float:
        """The number in a tensor of one element. Raises CheckpointError unless it is finite and not 0."""
        if entry.numel != 1 or entry.dtype not in ("F32", "F16", "BF16"):
            raise wrong(entry, f"is {entry.dtype} {list(entry.shape)}, where one number is expected")
        return float(checked_scales(entry, self.bytes_of(entry), 0)[0])


def scale_numbers(entry: TensorEntry, data: bytes | bytearray) -> Floats:
    """Scales as float32: U8 and E8M0 are exponents."""
    from pymerge.checkpoint.dequantise.numbers import numbers, powers_of_two

    return powers_of_two(data) if entry.dtype in ("U8", "F8_E8M0") else numbers(data, entry.dtype)


def checked_scales(entry: TensorEntry, data: bytes | bytearray, first: int, *, zero: bool = False) -> Floats:
    """Scales as float32, those of `entry` from its element `first` on. Raises CheckpointError as `check_scales`."""
    import numpy as np

    values = scale_numbers(entry, data)
    sound = np.isfinite(values) & (zero or values != 0)
    if not sound.all():
        at = int(np.argmin(sound))
        raise wrong(entry, f"holds a scale that is {values[at]:g} (element {first + at}), which no quantiser writes")
    return values


def wrong(entry: TensorEntry, text: str, remedy: str = AGAIN) -> CheckpointError:
    """The error of a quantised tensor that is not as its format says."""
    return CheckpointError(f"{entry.file}: tensor {shorten(entry.name)} {text}; {remedy}")
