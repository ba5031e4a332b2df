"""The library behind numpy's products and decompositions: its threads, which decide how sums are rounded, its name."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# What says and sets the number of threads, in numpy's own wheels and where it is built with another library.
_THREADS = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("bli_thread_get_num_threads", "bli_thread_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)
# What names the instructions that it has code for.
_CORES = ("scipy_openblas_get_corename64_", "scipy_openblas_get_corename", "openblas_get_corename")

_lock = threading.Lock()
_inside = 0  # blocks of `one_blas_thread` that are under way
_before = 1  # threads outside of them


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have each product and decomposition of numpy computed by the thread that asks for it, in the whole process.

    Of a library that cannot be told, nothing changes: then OMP_NUM_THREADS=1 says so.
    """
    global _inside, _before
    found = _threads()
    if found is None:
        yield
        return
    get, put = found
    with _lock:
        if _inside == 0:
            _before = get()
            put(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                put(_before)


def blas_name() -> str:
    """The library's name for the processor; "" where it has none."""
    for name in _CORES:
        if (function := getattr(_library(), name, None)) is not None:
            function.restype = ctypes.c_char_p
            return str(function().decode())
    return ""


@cache
def _threads() -> tuple[Any, Any] | None:
    """The functions that get and set the number of threads."""
    for names in _THREADS:
        get, put = (getattr(_library(), name, None) for name in names)
        if get is not None and put is not None:
            return get, put
    return None


@cache
def _library() -> ctypes.CDLL:
    """numpy's module of decompositions: what it was linked with is found by its handle."""
    from numpy.linalg import _umath_linalg

    return ctypes.CDLL(_umath_linalg.__file__)
