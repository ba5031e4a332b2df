"""State dicts in memory: quantised ones are refused, and integers must be the same in all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pymerge import merge_state_dicts
from pymerge.errors import ArgumentError, NonFiniteError
from pymerge.wemoe import upscale

WEIGHT = torch.eye(4)
PLAIN = {"a.weight": WEIGHT, "position_ids": torch.arange(4)[None], "bn.num_batches_tracked": torch.tensor(3)}
QUANTISED = {
    "int8": {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.scale": torch.ones(4, 1)},
    "fp8": {"a.weight": WEIGHT.to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)},
    "mlx": {"a.weight": torch.ones(4, 1, dtype=torch.uint32), "a.scales": torch.ones(4, 1)},
    "bfloat16 as uint16": {"a.weight": WEIGHT.bfloat16().view(torch.uint16)},
    "experts": {"mlp.experts.down_proj": torch.ones(2, 4, 4, dtype=torch.int8)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused(kind: str) -> None:
    state = QUANTISED[kind]
    with pytest.raises(ArgumentError, match=r"the base .*(quantised|stored as U16).*; (merge the original|view each)"):
        merge_state_dicts(state, [state], "linear", weight=1.0)
    name = next(iter(state))
    plain = {each: torch.ones(tensor.shape) for each, tensor in state.items()}
    with pytest.raises(ArgumentError, match=rf"expert 1 .*'{name}'"):
        merge_state_dicts(plain, [plain, state], "linear", weight=1.0)


def test_integers_must_agree() -> None:
    expert = PLAIN | {"a.weight": WEIGHT + 1, "bn.num_batches_tracked": torch.tensor(9)}
    merged = merge_state_dicts(PLAIN, [expert], "linear", weight=1.0)
    assert torch.equal(merged["a.weight"], WEIGHT + 1)
    assert torch.equal(merged["position_ids"], PLAIN["position_ids"])
    assert merged["bn.num_batches_tracked"] == 3
    same = expert | {"position_ids": PLAIN["position_ids"].to(torch.int32)}
    merge_state_dicts(PLAIN, [same], "linear", weight=1.0)
    for changed in (torch.arange(1, 5)[None], torch.arange(5)[None], torch.arange(4).float()[None] + 0.5):
        with pytest.raises(ArgumentError, match="position_ids: expert 0 has other integers than the base"):
            merge_state_dicts(PLAIN, [expert | {"position_ids": changed}], "linear", weight=1.0)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_constants_known_by_their_names_are_the_bases(method: str) -> None:
    base = PLAIN | {
        "rotary_emb.inv_freq": torch.tensor([1.0, 0.1]),
        "attn_mask": torch.full((4, 4), -torch.inf).triu(1),
    }
    expert = base | {"rotary_emb.inv_freq": torch.tensor([1.0, 0.5]), "attn_mask": base["attn_mask"].clamp(min=-1e9)}
    merged = merge_state_dicts(base, [expert], method, weight=0.5)
    assert all(torch.equal(merged[name], base[name]) for name in ("rotary_emb.inv_freq", "attn_mask"))
    with pytest.raises(NonFiniteError, match="attn_mask"):
        merge_state_dicts(base, [expert | {"attn_mask": torch.full((4, 4), torch.nan)}], method, weight=0.5)


@pytest.mark.parametrize("method", ["task_arithmetic", "cart", "wudi_flow"])
def test_a_result_that_is_not_finite_is_an_error(method: str) -> None:
    """As in a merge of files."""
    base = {"a.weight": torch.randn(8, 6)}
    experts = [{"a.weight": base["a.weight"] + 0.1 * torch.randn(8, 6)} for _ in range(2)]
    huge = {"scale" if method == "wudi_flow" else "lambda": 1e308}
    with pytest.raises(NonFiniteError, match=r"a\.weight: .* has values that torch\.float32 cannot hold"):
        merge_state_dicts(base, experts, method, **huge)
    small = [{"a.weight": 3e4 * torch.ones(8, 6, dtype=torch.float16)} for _ in range(3)]
    with pytest.raises(NonFiniteError, match=r"torch\.float16 cannot hold.*wider dtype"):
        merge_state_dicts({"a.weight": torch.zeros(8, 6, dtype=torch.float16)}, small, "task_arithmetic", weight=1.0)


def test_upscale_refuses_quantised_experts() -> None:
    base = nn.Sequential()
    base.add_module("mlp", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    expert = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expert |= {"mlp.0.weight": torch.ones(4, 4, dtype=torch.int8), "mlp.0.weight_scale": torch.ones(4)}
    with pytest.raises(ArgumentError, match=r"upscale: expert 'a' is quantised \(compressed-tensors"):
        upscale(base, {"a": expert})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((2, 3)), r"expert 1 has a numpy.ndarray under 'up_proj.weight', and no tensor .*torch.from_numpy"),
        ("text", r"expert 1 has a str under 'up_proj.weight', .*; leave it out"),
        (None, r"expert 1 has a NoneType under 'up_proj.weight'"),
    ],
)
def test_what_is_no_tensor_is_told_by_its_name(value: object, message: str) -> None:
    base = {"up_proj.weight": torch.ones(2, 3)}
    with pytest.raises(ArgumentError, match=message):
        merge_state_dicts(base, [base, {"up_proj.weight": value}], "task_arithmetic", weight=1)


def test_one_mapping_is_no_list_of_experts_and_a_broken_pattern_is_told() -> None:
    base = {"up_proj.weight": torch.ones(2, 3)}
    with pytest.raises(ArgumentError, match="experts is one mapping; pass a list of them"):
        merge_state_dicts(base, base, "wudi")
    with pytest.raises(ArgumentError, match="expert 0 is a list; pass a mapping of names to tensors"):
        merge_state_dicts(base, [[torch.ones(2, 3)]], "wudi")
    with pytest.raises(ArgumentError, match=r"parameter 'exclude': '\(' is not a regular expression"):
        merge_state_dicts(base, [base], "wudi", exclude=["("])
