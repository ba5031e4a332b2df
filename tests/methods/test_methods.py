"""WUDI, ACE and the averages against independent float64 forms (helpers/oracles.py), through the Python interface."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError, ConfigError, NonFiniteError
from pymerge.methods.ace import SolveAce
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.oracles import ace_delta, filter_delta, wudi_delta

# (d_out, d_in, T, rank): square-ish and tiny, tall, wide, rank-deficient, wide with few tasks (A is singular), one
# row, one column, one task.
SHAPES = [
    (7, 9, 4, None),
    (96, 64, 8, None),
    (32, 96, 4, None),
    (20, 16, 3, 2),
    (24, 160, 3, None),
    (1, 16, 3, None),
    (16, 1, 3, None),
    (12, 10, 1, None),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = os.environ.get("PYMERGE_TEST_DEVICE", "cpu")  # `make gpu` sets cuda
WUDI_TOLERANCE = 2e-5  # of the displacement from the start, float32
ACE_TOLERANCE = 1e-5  # of X, float32
FILTER_TOLERANCE = 2e-5  # of X, float32


def merged_delta(base, experts, method, **parameters):
    """X found by the engine, in float64: a float64 result, so that adding it to W_0 rounds nothing away."""
    merged = pymerge.merge_tensors(base, experts, method, dtype=torch.float64, device=DEVICE, **parameters)
    return as_float64(merged) - as_float64(base)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wudi_matches_the_published_loop(shape, dtype):
    d_out, d_in, tasks, rank = shape
    base, experts = make_weights(d_out, d_in, tasks, rank=rank, dtype=dtype)
    expected, start = wudi_delta(as_float64(base), [as_float64(expert) for expert in experts])
    found = merged_delta(base, experts, "wudi")
    displacement = expected - start
    if tasks == 1:  # stationary from the start: nothing moves
        assert relative_error(found, expected) < 1e-6
    else:
        assert relative_error(found, expected, displacement) < WUDI_TOLERANCE


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_wudi_float64_inputs_are_merged_in_float64(backend):
    base, experts = make_weights(20, 30, 3, dtype=torch.float64)
    expected, start = wudi_delta(as_float64(base), [as_float64(expert) for expert in experts])
    merged = pymerge.merge_tensors(base, experts, "wudi", backend=backend)
    assert merged.dtype == torch.float64
    assert relative_error(as_float64(merged) - as_float64(base), expected, expected - start) < 1e-10


@pytest.mark.parametrize(("iterations", "lr", "scale"), [(0, 1e-5, 1.0), (1, 1e-4, 1.0), (40, 1e-4, 0.5)])
def test_wudi_parameters(iterations, lr, scale):
    base, experts = make_weights(18, 22, 3)
    expected, _ = wudi_delta(as_float64(base), [as_float64(expert) for expert in experts], iterations, lr)
    found = merged_delta(base, experts, "wudi", iterations=iterations, lr=lr, scale=scale)
    assert relative_error(found, scale * expected) < 1e-6


def test_wudi_lr_auto_scales_with_the_deltas():
    """Deltas s times as large get s times the step, and so s times the solution."""
    base, experts = make_weights(32, 48, 4, dtype=torch.float64)
    large = [base + 10 * (expert - base) for expert in experts]
    small_X = merged_delta(base, experts, "wudi", lr="auto")
    large_X = merged_delta(base, large, "wudi", lr="auto")
    assert relative_error(large_X, 10 * small_X) < 1e-3  # Adam's eps is the one thing that does not scale
    rms = float(torch.stack([expert - base for expert in experts]).square().mean().sqrt())
    fixed = merged_delta(base, experts, "wudi", lr=1e-5 * rms / 5e-4)
    np.testing.assert_allclose(small_X, fixed, rtol=1e-12, atol=0)


# A single row has no covariance to normalise (test_ace_one_row_forced): forcing it has no formula to match.
ACE_CASES = [
    (shape, threshold)
    for shape in SHAPES
    for threshold in (0.3, -1.0, float("inf"))
    if not (shape[0] == 1 and threshold < 0)
]


@pytest.mark.parametrize(("shape", "threshold"), ACE_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_ace_matches_the_formulas(shape, dtype, variant, threshold):
    d_out, d_in, tasks, rank = shape
    # Full rank up to the k = 30 % that the refinement cuts: below the rank its singular vectors are arbitrary.
    k_frac = 0.05 if rank else 0.3
    base, experts = make_weights(d_out, d_in, tasks, rank=rank, dtype=dtype)
    expected = ace_delta(as_float64(base), [as_float64(expert) for expert in experts], 1e-5, threshold, k_frac, variant)
    found = merged_delta(base, experts, "ace", gamma_threshold=threshold, variant=variant, k_frac=k_frac)
    if d_out == 1 and variant == "released":  # centring leaves nothing of a single row
        assert np.abs(found).max() == 0
        assert np.abs(expected).max() == 0
    else:
        assert relative_error(found, expected) < ACE_TOLERANCE


@pytest.mark.parametrize("rms", [5e-4, 3e-3, 3e-2])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_ace_ill_conditioned_systems_are_solved_in_float64(rms, eps):
    """Large wide deltas with a small ridge: cond(S) reaches 1e5, far beyond float32."""
    base, experts = make_weights(24, 160, 3, rms=rms)
    expected = ace_delta(as_float64(base), [as_float64(expert) for expert in experts], eps, float("inf"))
    assert relative_error(merged_delta(base, experts, "ace", eps=eps), expected) < ACE_TOLERANCE


@pytest.mark.parametrize(("eps", "dtype"), [(1.0, torch.float32), (1e-5, torch.float64)])
def test_ace_forms_its_system_once(eps, dtype):
    """The precision is decided before the products that cost the most."""
    base, experts = make_weights(24, 160, 3, rms=3e-3)
    run_op, formed = Runner("auto", "cpu"), []

    def record(op, *arguments, **keywords):
        formed.extend([keywords["dtype"]] if op == "normal_equations" else [])
        return run_op(op, *arguments, **keywords)

    SolveAce(eps, float("inf"), 0.3, "released", 1.0, "auto").run(record, base, experts)
    assert formed == [dtype]


def test_ace_heterogeneity_decides_by_gamma():
    """Norms far apart switch the normalisation on, equal norms leave it off; forcing changes the result."""
    equal = make_weights(20, 24, 4, spread=0.0)
    apart = make_weights(20, 24, 4, rms=1e-2, spread=30.0)
    for (base, experts), heterogeneous in [(equal, False), (apart, True)]:
        default = merged_delta(base, experts, "ace")
        same = merged_delta(base, experts, "ace", gamma_threshold=-1.0 if heterogeneous else float("inf"))
        other = merged_delta(base, experts, "ace", gamma_threshold=float("inf") if heterogeneous else -1.0)
        np.testing.assert_array_equal(default, same)
        assert relative_error(default, other) > 1e-2


def test_ace_one_row_forced():
    """A one-row weight has no centred covariance: normalising it is impossible, and it gets the mean."""
    base, experts = make_weights(1, 16, 3)
    found = merged_delta(base, experts, "ace", gamma_threshold=-1.0)
    mean = sum(as_float64(expert) - as_float64(base) for expert in experts) / 3
    assert relative_error(found, mean) < 1e-5


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_a_task_that_did_not_touch_the_weight_changes_nothing(method):
    base, experts = make_weights(20, 24, 3)
    without = pymerge.merge_tensors(base, experts, method)
    with_zero = pymerge.merge_tensors(base, [*experts[:2], base.clone(), experts[2]], method)
    torch.testing.assert_close(with_zero, without, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["wudi", "ace", "task_arithmetic", "linear"])
@pytest.mark.parametrize("shape", [(6, 5), (5,), (), (0, 4), (4, 0), (1, 1), (2, 3, 4)], ids=str)
def test_experts_equal_to_the_base_give_the_base(method, shape):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    merged = pymerge.merge_tensors(base, [base.clone()] * 3, method)
    assert merged.dtype == base.dtype
    torch.testing.assert_close(merged, base, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_conv1d_is_the_transpose(method):
    """GPT-2's Conv1D stores d_in x d_out: in_axis=0 on the transpose is in_axis=1 on the weight, bit for bit."""
    base, experts = make_weights(24, 40, 3, dtype=torch.bfloat16)
    plain = pymerge.merge_tensors(base, experts, method)
    stored = [tensor.mT.contiguous() for tensor in [base, *experts]]
    transposed = pymerge.merge_tensors(stored[0], stored[1:], method, in_axis=0)
    torch.testing.assert_close(transposed.mT, plain, rtol=0, atol=0)
    wrong = pymerge.merge_tensors(stored[0], stored[1:], method, in_axis=1)
    assert not torch.equal(wrong.mT, plain)


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_a_stack_is_a_batch_of_linears(method):
    pairs = [make_weights(16, 24, 3, seed=seed) for seed in range(4)]
    base = torch.stack([base for base, _ in pairs])
    experts = [torch.stack([experts[t] for _, experts in pairs]) for t in range(3)]
    merged = pymerge.merge_tensors(base, experts, method)
    one_by_one = torch.stack([pymerge.merge_tensors(base, experts, method) for base, experts in pairs])
    torch.testing.assert_close(merged, one_by_one, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_strided_inputs(method):
    base, experts = make_weights(24, 40, 3)
    views = [torch.stack([tensor, tensor * 7], dim=-1)[..., 0] for tensor in [base, *experts]]
    assert not views[0].is_contiguous()
    merged = pymerge.merge_tensors(views[0], views[1:], method)
    torch.testing.assert_close(merged, pymerge.merge_tensors(base, experts, method), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_are_exact_to_the_last_place(dtype):
    base, experts = make_weights(30, 20, 3, dtype=dtype)
    values = np.stack([as_float64(expert) for expert in experts])
    weights = np.array([0.5, -0.2, 0.9])
    linear = pymerge.merge_tensors(base, experts, "linear", weight=list(weights))
    arithmetic = pymerge.merge_tensors(base, experts, "task_arithmetic", weight=list(weights), lambda_=0.7)
    for merged, exact in [
        (linear, np.tensordot(weights / weights.sum(), values, 1)),
        (arithmetic, as_float64(base) + 0.7 * np.tensordot(weights, values - as_float64(base), 1)),
    ]:
        # One rounding to the storage dtype, and those of a float32 sum of terms that are larger than the result.
        rounding = torch.finfo(dtype).eps / 2 * np.abs(exact)
        summing = torch.finfo(torch.float32).eps * len(experts) * np.abs(values).max()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (np.abs(as_float64(merged) - exact) <= rounding + summing + smallest).all()


def test_state_dicts_treat_each_tensor_as_what_it_is():
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.attn.c_attn.bias": (24,),
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["position_ids"] = torch.arange(4)
    experts = [
        {
            k: v + 1e-3 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v + 1
            for k, v in base.items()
        }
        for _ in range(3)
    ]
    merged = pymerge.merge_state_dicts(base, experts, "wudi")
    assert list(merged) == list(base)
    torch.testing.assert_close(merged["position_ids"], base["position_ids"], rtol=0, atol=0)
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "h.0.attn.c_attn.bias"):
        mean = sum(expert[name].double() for expert in experts) / 3
        torch.testing.assert_close(merged[name].double(), mean, rtol=1e-6, atol=1e-7)
    for name, in_axis in [("model.layers.0.mlp.up_proj.weight", 1), ("h.0.attn.c_attn.weight", 0)]:
        one = pymerge.merge_tensors(base[name], [expert[name] for expert in experts], "wudi", in_axis=in_axis)
        torch.testing.assert_close(merged[name], one, rtol=0, atol=0)


def test_rest_and_exclude():
    base, experts = make_weights(16, 12, 3)
    name = "model.layers.0.mlp.up_proj.weight"
    dicts = [{name: expert} for expert in experts]
    kept = pymerge.merge_state_dicts({name: base}, dicts, "wudi", exclude=["up_proj"], rest="base")
    torch.testing.assert_close(kept[name], base, rtol=0, atol=0)
    mean = pymerge.merge_state_dicts({name: base}, dicts, "wudi", exclude=["up_proj"])
    torch.testing.assert_close(mean[name], sum(experts) / 3, rtol=1e-6, atol=1e-8)


def test_mistakes_are_named():
    base, experts = make_weights(6, 5, 2)
    with pytest.raises(ConfigError, match="did you mean 'wudi'"):
        pymerge.merge_tensors(base, experts, "wudy")
    with pytest.raises(ArgumentError, match="did you mean 'iterations'"):
        pymerge.merge_tensors(base, experts, "wudi", iteration=3)
    with pytest.raises(ArgumentError, match="at least 0"):
        pymerge.merge_tensors(base, experts, "wudi", iterations=-1)
    with pytest.raises(ArgumentError, match="3 values for 2 experts"):
        pymerge.merge_tensors(base, experts, "linear", weight=[1, 2, 3])
    with pytest.raises(ArgumentError, match=r"expert 1 has shape \(5, 6\), the base \(6, 5\)"):
        pymerge.merge_tensors(base, [experts[0], experts[1].mT], "wudi")
    with pytest.raises(ArgumentError, match="no experts"):
        pymerge.merge_tensors(base, [], "wudi")
    with pytest.raises(ArgumentError, match="add up to 0"):
        pymerge.merge_tensors(base, experts, "linear", weight=[1, -1])
    broken = experts[1].clone()
    broken[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="expert 1"):
        pymerge.merge_tensors(base, [experts[0], broken], "ace")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.up\.weight"):
        pymerge.merge_state_dicts({"layers.0.up.weight": base}, [{"layers.0.up.weight": broken}])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "time", "rank", "parameters"),
    [
        ("wudi_flow", 300.0, 1.0, {}),
        ("wudi_flow", 1300.0, 1.0, {"time": 1300}),
        ("swudi", 300.0, 1.0, {}),
        ("swudi", 1300.0, 0.65, {"time": 1300, "rank_ratio": 0.65}),
        ("swudi_a", float("inf"), "participation_sqrt", {}),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, float)) else "",
)
def test_closed_forms_match_eigenvectors_in_float64(shape, dtype, method, time, rank, parameters):
    d_out, d_in, tasks, low = shape
    base, experts = make_weights(d_out, d_in, tasks, rank=low, dtype=dtype)
    expected, _ = filter_delta(as_float64(base), [as_float64(expert) for expert in experts], time, rank)
    assert relative_error(merged_delta(base, experts, method, **parameters), expected) < FILTER_TOLERANCE


def test_flow_limits():
    """Time 0 is the sum of task vectors; a long time the least-squares solution; one task is its own merge."""
    base, experts = make_weights(40, 24, 3)
    taus = [as_float64(expert) - as_float64(base) for expert in experts]
    np.testing.assert_allclose(merged_delta(base, experts, "wudi_flow", time=0), sum(taus), atol=1e-9)
    A = sum(tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
    B = sum(tau @ tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
    exact = B @ np.linalg.inv(A)
    long = merged_delta(base, experts, "wudi_flow", time=1e9, precision="float64")
    assert relative_error(long, exact) < 1e-7
    for method in ("wudi_flow", "swudi", "swudi_a"):
        assert relative_error(merged_delta(base, experts[:1], method), taus[0]) < 1e-6


def test_flow_does_not_depend_on_the_scale_of_the_deltas():
    base, experts = make_weights(32, 48, 4, dtype=torch.float64)
    large = [base + 64 * (expert - base) for expert in experts]
    small_X, large_X = (merged_delta(base, each, "wudi_flow") for each in (experts, large))
    assert relative_error(large_X, 64 * small_X) < 1e-9
