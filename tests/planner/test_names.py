"""Experts with other names than the base's: the merge of files that were renamed beforehand, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge import api
from pymerge.errors import PlanError
from tests.helpers.checkpoints import Tensors, fine_tuned, load_output, write_config, write_model

BERT = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2}
METHODS = ("linear", "task_arithmetic", "dare_ties", "wudi_flow")


def drawn(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    def new(name: str) -> str:
        for old, other in pairs:
            name = name.replace(old, other, 1)
        return name

    return {new(name): tensor for name, tensor in tensors.items()}


def same_merge(
    folder: Path,
    base: Tensors,
    other: Callable[[Tensors], Tensors],
    method: str = "linear",
    config: dict[str, Any] | None = None,
) -> list[str]:
    """Merge with an expert in its other form and in the base's; both give the same bytes. Returns the warnings."""
    plans = []
    for place, form in (("straight", lambda tensors: tensors), ("other", other)):
        write_model(folder / place / "base", base, config=config or {})
        write_model(folder / place / "e0", fine_tuned(base, 0, 0.05), config=config or {})
        write_model(folder / place / "e1", form(fine_tuned(base, 1, 0.05)), config=config or {})
        write_config(folder / place, method, **({"weight": 0.5, "density": 0.5} if method == "dare_ties" else {}))
        plans.append(api.merge(folder / place / "merge.yml", folder / place / "out", device="cpu", progress=False))
    straight, found = ((folder / place / "out/model.safetensors").read_bytes() for place in ("straight", "other"))
    assert load_output(folder / "other/out").keys() == base.keys()
    assert found == straight
    assert api.plan(folder / "straight/merge.yml").warnings == ()
    warnings = api.plan(folder / "other/merge.yml").warnings
    assert all(str(folder / "other/e1") in warning for warning in warnings)
    return list(warnings)


def refusal(folder: Path, base: Tensors, expert: Tensors, config: dict[str, Any] | None = None) -> str:
    write_model(folder / "base", base, config=config or {})
    for number in range(2):
        write_model(folder / f"e{number}", expert, config=config or {})
    write_config(folder, "linear")
    with pytest.raises(PlanError) as caught:
        api.plan(folder / "merge.yml")
    return str(caught.value)


def bert(prefix: str = "") -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (20, 8)}
    for inside in ("embeddings", *(f"encoder.layer.{i}.output" for i in range(2))):
        shapes |= {f"{inside}.LayerNorm.weight": (8,), f"{inside}.LayerNorm.bias": (8,)}
    shapes |= {f"encoder.layer.{i}.output.dense.weight": (8, 8) for i in range(2)}
    return drawn({prefix + name: shape for name, shape in shapes.items()})


OLD_NORMS = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
NEW_NORMS = tuple((new, old) for old, new in OLD_NORMS)


@pytest.mark.parametrize("method", METHODS)
def test_gamma_and_beta(method: str, tmp_path: Path) -> None:
    base = bert()
    (warning,) = same_merge(tmp_path / "new", base, lambda one: renamed(one, *OLD_NORMS), method)
    assert all(f"{old} read as {new} (3 tensors)" in warning for old, new in (("gamma", "weight"), ("beta", "bias")))
    (warning,) = same_merge(tmp_path / "old", renamed(base, *OLD_NORMS), lambda one: renamed(one, *NEW_NORMS), method)
    assert all(f"{new} read as {old} (3 tensors)" in warning for old, new in (("gamma", "weight"), ("beta", "bias")))


def test_gamma_beside_a_prefix_and_without_beta(tmp_path: Path) -> None:
    base = bert()
    warnings = same_merge(
        tmp_path / "prefix", base, lambda one: {f"bert.{name}": t for name, t in renamed(one, *OLD_NORMS).items()}
    )
    assert any("'bert.' taken away from its names (9 tensors)" in warning for warning in warnings)
    assert any("gamma read as weight (3 tensors)" in warning for warning in warnings)
    plain = {name: tensor for name, tensor in base.items() if not name.endswith("LayerNorm.bias")}
    same_merge(tmp_path / "alone", plain, lambda one: renamed(one, *OLD_NORMS))


def test_one_gamma_alone_is_the_scale_of_a_layer(tmp_path: Path) -> None:
    base = bert() | {f"encoder.layer.{i}.scale.weight": torch.ones(8) for i in range(2)}
    text = refusal(tmp_path, base, renamed(base, ("scale.weight", "scale.gamma")))
    assert "lacks 2 tensors: encoder.layer.0.scale.weight" in text


@pytest.mark.parametrize("method", METHODS)
def test_both_forms_of_weight_norm(method: str, tmp_path: Path) -> None:
    wav2vec2 = {"encoder.pos_conv_embed.conv.bias": (8,), "encoder.layers.0.attention.k_proj.weight": (8, 8)}
    vits = {f"decoder.upsampler.{i}.bias": (4,) for i in range(2)}
    for convolution in ("encoder.pos_conv_embed.conv", *(f"decoder.upsampler.{i}" for i in range(2))):
        wav2vec2 |= {f"{convolution}.weight_g": (1, 1, 4), f"{convolution}.weight_v": (8, 2, 4)}
    base = drawn(wav2vec2 | vits)
    old = ((".weight_g", ".parametrizations.weight.original0"), (".weight_v", ".parametrizations.weight.original1"))
    (warning,) = same_merge(tmp_path / "old", base, lambda one: renamed(one, *old), method)
    assert "parametrizations.weight.original0 read as weight_g (3 tensors)" in warning
    new = tuple((two, one) for one, two in old)
    same_merge(tmp_path / "new", renamed(base, *old), lambda one: renamed(one, *new), method)


def test_half_of_a_weight_norm_is_missing(tmp_path: Path) -> None:
    base = drawn({"conv.weight_g": (1, 1, 4), "conv.weight_v": (8, 2, 4), "a.weight": (4, 4)})
    expert = renamed(base, (".weight_g", ".parametrizations.weight.original0"))
    del expert["conv.weight_v"]
    assert "lacks 1 tensor: conv.weight_v;" in refusal(tmp_path, base, expert)


def vision_language(text: str, vision: str, head: str) -> Tensors:
    shapes = {f"{text}embed_tokens.weight": (20, 8), f"{text}norm.weight": (8,), f"{head}lm_head.weight": (20, 8)}
    for i in range(2):
        shapes |= {f"{text}layers.{i}.self_attn.q_proj.weight": (8, 8), f"{text}layers.{i}.mlp.up_proj.weight": (12, 8)}
        shapes |= {f"{vision}encoder.layers.{i}.self_attn.q_proj.weight": (8, 8)}
        shapes |= {f"{vision}encoder.layers.{i}.layer_norm1.bias": (8,)}
    return drawn(shapes | {f"{vision}embeddings.patch_embedding.weight": (8, 3, 2, 2)})


TOWERS = {
    "qwen2_vl": ("model.", "visual.", ""),
    "llava": ("language_model.model.", "vision_tower.vision_model.", "language_model."),
    "llava_5": ("model.language_model.", "model.vision_tower.vision_model.", ""),
    "qwen2_vl_5": ("model.language_model.", "model.visual.", ""),
    "mllama": ("language_model.model.", "vision_model.", "language_model."),
    "mllama_5": ("model.language_model.", "model.vision_model.", ""),
    "twice": ("model.language_model.model.", "model.vision_tower.vision_model.", ""),
    "thinker": ("thinker.model.", "thinker.visual.", "thinker."),
}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("qwen2_vl", "qwen2_vl_5"),
        ("llava", "llava_5"),
        ("mllama", "mllama_5"),
        ("twice", "llava_5"),
        ("llava", "twice"),
        ("qwen2_vl", "thinker"),
    ],
)
@pytest.mark.parametrize("method", ["linear", "wudi_flow"])
def test_towers_that_moved(one: str, two: str, method: str, tmp_path: Path) -> None:
    first, second = vision_language(*TOWERS[one]), vision_language(*TOWERS[two])
    for place, base, other in (("there", first, second), ("back", second, first)):
        names = dict(zip(base, other, strict=True))
        warnings = same_merge(
            tmp_path / place, base, lambda one, names=names: {names[name]: t for name, t in one.items()}, method
        )
        assert len(warnings) == 1


def test_wrappers_inside_of_names(tmp_path: Path) -> None:
    base = vision_language(*TOWERS["qwen2_vl"])
    same_merge(tmp_path / "a", base, lambda one: renamed(one, (".self_attn", "._checkpoint_wrapped_module.self_attn")))
    same_merge(tmp_path / "b", base, lambda one: renamed(one, ("", "module."), (".layers", "._orig_mod.layers")))


def test_towers_of_one_shape_under_one_name_are_refused(tmp_path: Path) -> None:
    base = drawn({f"layers.{i}.q_proj.weight": (8, 8) for i in range(2)})
    expert = {f"{tower}.{name}": tensor.clone() for tower in ("text", "vision") for name, tensor in base.items()}
    text = refusal(tmp_path, base, expert)
    assert "more than one way: layers.*.q_proj.weight: 'text.' taken away from its names, or 'vision.'" in text
    assert text.endswith("as a model of its own, under the names of that model")  # and nothing about what it lacks
    text = refusal(tmp_path / "back", expert, base)
    assert "could be text.layers.0.q_proj.weight, or vision.layers.0.q_proj.weight; save the part" in text


def mixture(stem: str = "mlp", words: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Tensors:
    """Experts one by one in two blocks, a router and shared experts beside them, and a dense block before."""
    gate, up, down = words
    shapes = {f"model.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(3)}
    shapes["model.layers.0.mlp.gate_proj.weight"] = (12, 8)
    for i in (1, 2):
        inside = f"model.layers.{i}.{stem}"
        shapes |= {f"{inside}.gate.weight": (4, 8), f"{inside}.shared_experts.up_proj.weight": (6, 8)}
        for e in range(4):
            shapes |= {f"{inside}.experts.{e}.{word}.weight": (6, 8) for word in (gate, up)}
            shapes[f"{inside}.experts.{e}.{down}.weight"] = (8, 6)
    return drawn(shapes)


ORDER = ("gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


def stacked(tensors: Tensors, *, turned: bool = False, joined: bool = True, suffix: str = "") -> Tensors:
    """The experts of `mixture` in stacks, as transformers 5 has them."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for stem in sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name}):
        inside = [name for name in tensors if name.startswith(f"{stem}.experts.")]
        words = sorted({name.split(".")[-2] for name in inside}, key=ORDER.index)
        each = [torch.stack([tensors[f"{stem}.experts.{e}.{word}.weight"] for e in range(4)]) for word in words]
        stacks = dict(zip(("gate_proj", "up_proj", "down_proj"), each, strict=True))
        if joined:
            both = torch.cat([stacks.pop("gate_proj"), stacks.pop("up_proj")], dim=1)
            stacks["gate_up_proj"] = both
        stacks = {word: (t.mT if turned else t).contiguous() for word, t in stacks.items()}
        found |= {f"{stem}.experts.{word}{suffix}": tensor for word, tensor in stacks.items()}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_stacks_read_as_single_experts_and_back(method: str, tmp_path: Path) -> None:
    base = mixture()
    (warning,) = same_merge(tmp_path / "split", base, stacked, method)
    assert "24 matrices of single experts are read out of its stacks" in warning
    singles = {name: tensor for name, tensor in mixture().items() if ".experts." in name}

    def unstacked(one: Tensors) -> Tensors:
        found = {name: tensor for name, tensor in one.items() if ".experts." not in name}
        for name in singles:
            stem, number, word, _ = name.rsplit(".", 3)
            if word == "down_proj":
                found[name] = one[f"{stem}.down_proj"][int(number)].clone()
            else:
                half = one[f"{stem}.gate_up_proj"][int(number)].chunk(2)[word == "up_proj"]
                found[name] = half.clone()
        return found

    (warning,) = same_merge(tmp_path / "stack", stacked(base), unstacked, method)
    assert "4 stacks of experts are put together from its experts" in warning


@pytest.mark.parametrize("method", ["task_arithmetic", "wudi_flow"])
def test_mixtral_before_and_after_transformers_5(method: str, tmp_path: Path) -> None:
    old = mixture("block_sparse_moe", ("w1", "w3", "w2"))

    def new(one: Tensors) -> Tensors:
        return renamed(stacked(one), ("block_sparse_moe", "mlp"))

    warnings = same_merge(tmp_path / "old", old, new, method)
    assert any("'mlp' with experts is 'block_sparse_moe' (2 modules)" in warning for warning in warnings)
    plain = renamed(old, ("block_sparse_moe", "mlp"), ("w1.", "gate_proj."), ("w3.", "up_proj."), ("w2.", "down_proj."))
    words = {"gate_proj.": "w1.", "up_proj.": "w3.", "down_proj.": "w2."}

    def other(one: Tensors) -> Tensors:
        inside = {name: tensor for name, tensor in one.items() if ".experts." in name}
        return {name: one[name] for name in one.keys() - inside.keys()} | renamed(inside, *words.items())

    (warning,) = same_merge(tmp_path / "words", plain, other, method)
    assert "24 tensors of experts are matched" in warning


def test_routers_and_stacks_under_other_words(tmp_path: Path) -> None:
    base = stacked(mixture("block_sparse_moe"))
    granite = (
        ("experts.gate_up_proj", "input_linear.weight"),
        ("experts.down_proj", "output_linear.weight"),
        ("moe.gate.weight", "moe.router.layer.weight"),
    )
    warnings = same_merge(tmp_path / "granite", base, lambda one: renamed(one, *granite))
    assert any("2 tensors of routers matched by their shape" in warning for warning in warnings)
    same_merge(tmp_path / "back", renamed(base, *granite), lambda one: renamed(one, *((b, a) for a, b in granite)))


def test_stacks_of_gate_and_up_apart(tmp_path: Path) -> None:
    base = stacked(mixture())
    apart = stacked(mixture(), joined=False)

    def cut(one: Tensors) -> Tensors:
        found = {name: tensor for name, tensor in one.items() if "gate_up" not in name}
        for name in one.keys() - found.keys():
            stem = name.removesuffix("gate_up_proj")
            found |= {
                f"{stem}{word}": t.contiguous()
                for word, t in zip(("gate_proj", "up_proj"), one[name].chunk(2, 1), strict=True)
            }
        return found

    assert cut(base).keys() == apart.keys()
    same_merge(tmp_path / "joined", base, cut)
    same_merge(
        tmp_path / "weight", base, lambda one: {f"{n}.weight" if n.endswith("_proj") else n: t for n, t in one.items()}
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "wudi_flow"])
def test_stacks_that_are_d_in_by_d_out(method: str, tmp_path: Path) -> None:
    config = {"model_type": "llama4_text", "hidden_size": 8, "intermediate_size": 6, "num_local_experts": 4}
    base = renamed(mixture(), (".mlp.experts", ".feed_forward.experts"))
    (warning,) = same_merge(tmp_path / "split", base, lambda one: stacked(one, turned=True), method, config)
    assert "24 matrices" in warning
    turned = stacked(base, turned=True)

    def unstacked(one: Tensors) -> Tensors:
        found = {name: tensor for name, tensor in one.items() if ".experts." not in name}
        for name in (name for name in base if ".experts." in name):
            stem, number, word, _ = name.rsplit(".", 3)
            stack = one[f"{stem}.{'down_proj' if word == 'down_proj' else 'gate_up_proj'}"][int(number)].mT
            found[name] = (stack if word == "down_proj" else stack.chunk(2)[word == "up_proj"]).contiguous()
        return found

    (warning,) = same_merge(tmp_path / "stack", turned, unstacked, method, config)
    assert "4 stacks" in warning
    # The same stacks, turned in one model alone (Qwen3-VL-MoE on the Hub, and as transformers 5 has it).
    same_merge(
        tmp_path / "turned",
        stacked(base),
        lambda one: {n: t.mT.contiguous() if t.ndim == 3 else t for n, t in one.items()},
        method,
        config | {"model_type": "qwen3_vl_moe_text"},
    )


def test_stacks_that_may_alternate_are_refused(tmp_path: Path) -> None:
    base = mixture()
    text = refusal(tmp_path, base, stacked(base, turned=True), {"model_type": "gpt_oss"})
    assert "lacks 24 tensors: model.layers.1.mlp.experts.0.down_proj.weight" in text


def test_other_experts_are_refused(tmp_path: Path) -> None:
    base = mixture()
    fewer = {name: t[:3].clone() if t.ndim == 3 else t for name, t in stacked(base).items()}
    assert "lacks 24 tensors" in refusal(tmp_path / "fewer", base, fewer)
    more = {name: torch.cat([t, t[:1]]) if t.ndim == 3 else t for name, t in stacked(base).items()}
    assert "lacks 24 tensors" in refusal(tmp_path / "more", base, more)


def test_the_plan_names_what_each_tensor_is_made_of(tmp_path: Path) -> None:
    from pymerge.cli.tensor_table import tensor_rows

    same_merge(tmp_path, mixture(), stacked)
    rows = {row["name"]: row["inputs"] for row in tensor_rows(api.plan(tmp_path / "other/merge.yml"))}
    up, down = (rows[f"model.layers.1.mlp.experts.2.{word}_proj.weight"] for word in ("up", "down"))
    assert up[1] == {"model": str(tmp_path / "other/e1"), "tensor": "model.layers.1.mlp.experts.gate_up_proj[2][6:12]"}
    assert down[1]["tensor"] == "model.layers.1.mlp.experts.down_proj[2]"


@pytest.mark.parametrize("method", ["wudi_flow", "ace", "task_arithmetic"])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_are_merged_the_same_in_stacks_and_one_by_one(method: str, turned: bool, tmp_path: Path) -> None:
    config = {"model_type": "llama4_text" if turned else "qwen3_moe", "hidden_size": 8, "num_local_experts": 4}
    config["moe_intermediate_size"] = 6
    base = mixture()
    experts = [fine_tuned(base, number, 0.05) for number in range(2)]
    outputs = []
    for place, form in (("single", lambda one: one), ("stacked", lambda one: stacked(one, turned=turned))):
        for name, tensors in (("base", base), ("e0", experts[0]), ("e1", experts[1])):
            write_model(tmp_path / place / name, form(tensors), config=config)
        write_config(tmp_path / place, method)
        api.merge(tmp_path / place / "merge.yml", tmp_path / place / "out", device="cpu", progress=False)
        outputs.append(load_output(tmp_path / place / "out"))
    single, stacks = stacked(outputs[0], turned=turned), outputs[1]
    assert single.keys() == stacks.keys()
    assert all(torch.equal(stacks[name], tensor) for name, tensor in single.items())


def test_gate_and_up_that_alternate(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "hidden_size": 8, "intermediate_size": 6, "num_local_experts": 4}

    def alternating(one: Tensors) -> Tensors:
        found = stacked(one, turned=True)
        for name in [name for name in found if name.endswith("gate_up_proj")]:
            gate, up = found[name].chunk(2, dim=2)
            found[name] = torch.stack([gate, up], dim=3).flatten(2)
        return found

    base = mixture()
    models = {"base": base} | {f"e{number}": fine_tuned(base, number, 0.05) for number in range(2)}
    for place, form in (("single", lambda one: one), ("stacked", alternating)):
        for name, tensors in models.items():
            write_model(tmp_path / place / name, form(tensors), config=config)
        write_config(tmp_path / place, "wudi_flow")
        api.merge(tmp_path / place / "merge.yml", tmp_path / place / "out", device="cpu", progress=False)
    expected = alternating(load_output(tmp_path / "single/out"))
    found = load_output(tmp_path / "stacked/out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    plan = api.plan(tmp_path / "stacked/merge.yml")
    step = next(step for step in plan.steps if step.name.endswith("gate_up_proj"))
    assert "2 weights in one, row by row" in step.role.describe()
