"""Ops on arrays in place of tensors and on any number of threads, and comparison of what they give."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pymerge.common.arrays import Array
from pymerge.ops._op import Op
from pymerge.testing.compare import assert_same

AnyOp = TypeVar("AnyOp", bound=Op[Any])


def with_arrays(op: AnyOp) -> AnyOp:
    """The op on arrays of the same values."""
    return dataclasses.replace(op, **{name: _as_array(value) for name, value in vars(op).items()})


def _as_array(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Array.of(value.cpu().contiguous())
    return [_as_array(each) for each in value] if isinstance(value, list) else value


def in_cpp(op: Op[Any], threads: int) -> Any:
    """The op's result in C++ on so many threads."""
    return import_module(f"pymerge.backends.native.{op.name}").compute(op, threads)


def assert_same_results(label: str, found: Any, expected: Any) -> None:
    """AssertionError unless results of one op agree bit for bit, whether they are tensors or arrays."""
    if isinstance(expected, tuple):
        for name, mine, theirs in zip(expected._fields, found, expected, strict=True):
            assert_same_results(f"{label}: {name}", mine, theirs)
    elif isinstance(expected, int):
        assert found == expected, label
    else:
        assert isinstance(found, np.ndarray) == isinstance(expected, np.ndarray), label
        assert_same(label, as_result(found), as_result(expected))


def as_result(values: Any) -> Tensor:
    """A result as a tensor, to be compared."""
    if isinstance(values, Array):
        return values.tensor()
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values
