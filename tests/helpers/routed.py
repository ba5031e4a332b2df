"""Routed models for tests: routers that tell samples apart, and the error of a result."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge import wemoe

FLOAT32 = wemoe.StorageSpec(dtype="float32")


def spread(model: wemoe.RoutedModel) -> wemoe.RoutedModel:
    """The model, its routers moved by random weights of order 1, so that they tell samples apart."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.routers.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`, in float64."""
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())
