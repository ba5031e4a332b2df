# csrc/bindings for NVIDIA devices; conventions as in _C.pyi, the last argument of a function is its stream.
from collections.abc import Sequence

from pymerge._C import Matrix

def build_info() -> str: ...
def trim_threshold(  # keys and ends int64; scratch of trim_threshold_scratch() bytes, zeros
    keys: int,
    ends: int,
    scratch: int,
    base: Matrix,
    experts: Sequence[Matrix],
    counts: Sequence[int],
    stream: int,
    /,
) -> None: ...
def trim_threshold_scratch(count: int, numel: int, /) -> int: ...
