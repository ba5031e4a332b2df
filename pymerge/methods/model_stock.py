"""Model Stock: how far from the base to the average of the models, by the angles between the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pymerge.methods.actions import Action
from pymerge.methods.base import COMPAT, Method, Parameter, Values
from pymerge.methods.rows import Vectors
from pymerge.methods.span import InSpan, norms

_SINGULAR = 1e-6  # of 1 + (T - 1) c: the base is kept
_LEAST_PRODUCT = 1e-6  # mergekit's lower limit of ||tau_s|| ||tau_t||


@dataclass(frozen=True)
class ModelStockSum(InSpan):
    """W_0 + t / T sum_t tau_t."""

    least_product: float = 0.0
    label: ClassVar[str] = "model stock"
    which: ClassVar[Vectors] = Vectors(on_base=True)

    def weights(self, dots: NDArray[Any]) -> NDArray[Any]:
        models = dots.shape[-1]
        first, second = np.triu_indices(models, 1)
        lengths = norms(dots)
        products = (lengths[:, first] * lengths[:, second]).clip(min=self.least_product)
        cosines = (dots[:, first, second] / np.where(products == 0.0, 1.0, products)).clip(-1.0, 1.0)
        mean = cosines.mean(-1)
        denominator = 1.0 + (models - 1) * mean
        singular = abs(denominator) < _SINGULAR
        t = np.where(singular, 0.0, models * mean / np.where(singular, 1.0, denominator))
        return np.repeat((t / models)[:, None], models, axis=1)


class ModelStock(Method):
    """W = t * mean_t W_t + (1 - t) W_0 with t = T c / (1 + (T - 1) c), c the mean cosine between two task vectors.

    Each tensor is one vector, or each row (`filter_wise`). A task vector of zeros has cosine 0 with all others. Where
    |1 + (T - 1) c| < 1e-6 the base is kept. `compat: mergekit` divides <tau_s, tau_t> by 1e-6 at least, which takes
    short task vectors for orthogonal ones.
    """

    name = "model_stock"
    summary = "base and average of two or more models, mixed by the angles between their task vectors"
    source = "Model Stock, arXiv 2403.19522"
    least_experts = 2
    parameters = (Parameter("filter_wise", "flag", False, "angles of each row, not of whole tensors"), COMPAT)

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return ModelStockSum(
            axis="rows" if values.merge["filter_wise"] else "whole",
            least_product=_LEAST_PRODUCT if values.merge["compat"] == "mergekit" else 0.0,
        )


METHODS = (ModelStock(),)
