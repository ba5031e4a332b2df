"""Routers: from the tokens of a sample to its gates, one for each expert."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymerge.wemoe.spec import Spec

CODE_SIZE = 8
_STD = 0.01


class Router(nn.Module):
    """Gates of each sample: the mean over its tokens of a small network's output; no softmax, gates may be negative.

    Depth 0 is a learnable vector filled with init_lambda; 1 is Linear(d, T); 2 is Linear(d, d), ReLU, Linear(d, T).
    Weights start as N(0, 0.01^2), the last bias as init_lambda, so that the gates start near it. They are
    float32. Source: WEMoE, arXiv 2402.00433, section 3.3.
    """

    def __init__(
        self, depth: int, width: int, tasks: int, init_lambda: float, code_size: int = 0, seed: int | None = None
    ) -> None:
        super().__init__()
        self.depth, self.tasks, self.code_size = depth, tasks, code_size
        if depth == 0:
            self.vector = nn.Parameter(torch.full((tasks,), init_lambda))
            return
        if depth == 2:
            self.hidden = nn.Linear(width + code_size, width)
        self.out = nn.Linear(width if depth == 2 else width + code_size, tasks)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (module for module in self.children() if isinstance(module, nn.Linear)):
                layer.weight.normal_(0.0, _STD, generator=generator)
                layer.bias.zero_()
            self.out.bias.fill_(init_lambda)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, code: Tensor | None = None) -> Tensor:
        """Gates (B x T; 1 x T at depth 0) of tokens (B x S x d); mask (B x S) is 0 for padding, which is not counted.

        A sample of padding alone counts as one token of zeros. `code` (8) is prepended to every token.
        """
        if self.depth == 0:
            return self.vector[None]
        tokens = tokens.to(self.out.weight.dtype)
        first = self.hidden if self.depth == 2 else self.out
        bias: Tensor = first.bias
        if code is not None:
            # The same for all tokens: its product is part of the bias.
            bias = bias + first.weight[:, : self.code_size] @ code.to(bias)
        weight = first.weight[:, self.code_size :]
        if self.depth == 1:
            return F.linear(_mean(tokens, mask), weight, bias)
        # The last layer is linear: the mean of its outputs is its output for the mean.
        gates: Tensor = self.out(_mean(F.relu(F.linear(tokens, weight, bias)), mask))
        return gates


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that the mask leaves in."""
    if mask is None:
        return tokens.mean(1)
    mask = (mask != 0).to(tokens.dtype)[:, :, None]
    return (torch.where(mask != 0, tokens, 0.0)).sum(1) / mask.sum(1).clamp(min=1.0)


def layer_code(index: int) -> Tensor:
    """[sin(p w_j), cos(p w_j)] for module index p and w_j = 10000^(-2j/8), j = 0..3 (E-WEMoE)."""
    angles = [index * 10000.0 ** (-2 * j / CODE_SIZE) for j in range(CODE_SIZE // 2)]
    return torch.tensor([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def router_count(spec: Spec) -> int:
    """Number of a model's routers: one for each module, or a single shared one."""
    return 1 if spec.router.shared else len(spec.modules)


def make_router(spec: Spec, index: int, seed: int | None = 0) -> Router:
    """Router number `index`, freshly initialised."""
    code_size = CODE_SIZE if spec.router.layer_code else 0
    width = spec.modules[index].hidden_size
    own = None if seed is None else seed + index
    return Router(spec.router.depth, width, spec.tasks, spec.init_lambda, code_size, own)


def make_routers(spec: Spec, seed: int = 0) -> nn.ModuleList:
    """Freshly initialised routers: one for each module in order, or a single shared one."""
    return nn.ModuleList(make_router(spec, index, seed) for index in range(router_count(spec)))
