"""Names in files of adapters: those of PEFT, those of raw dumps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pymerge.adapters.folder import is_adapter, open_adapter
from pymerge.errors import CheckpointError
from tests.helpers.adapters import Tensors, applied, factors, opened, read_all, write_adapter
from tests.helpers.checkpoints import llama, llama_config, write_model

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
STEM = "base_model.model."


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = llama()
    return write_model(tmp_path / "base", tensors, config=llama_config(tensors))


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(key): tensor for key, tensor in tensors.items()}


FORMS: dict[str, Callable[[str], str]] = {
    "without prefix": lambda key: key.removeprefix(STEM),
    "one word of prefix": lambda key: key.replace(STEM, "base_model."),
    "twice wrapped": lambda key: STEM + key,
    "the model inside": lambda key: key.replace("model.model.layers", "model.layers"),
    "a prefix more": lambda key: key.replace("model.layers", "language_model.model.layers"),
    "distributed": lambda key: f"module.{key}",
    "names of adapters": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_raw_dumps_give_the_same(base: Path, tmp_path: Path, form: str) -> None:
    found = factors(llama(), [Q, K])
    plain = read_all(opened(base, write_adapter(tmp_path / "a", found)))
    other = read_all(opened(base, write_adapter(tmp_path / "b", renamed(found, FORMS[form]))))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("form", ["bin", "pt"])
def test_files_of_torch_save_give_the_same(base: Path, tmp_path: Path, form: str) -> None:
    found = factors(llama(), [Q, K])
    plain = read_all(opened(base, write_adapter(tmp_path / "a", found)))
    other = read_all(opened(base, write_adapter(tmp_path / "b", found, form=form)))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_transposed_view_in_a_file_of_torch_save(base: Path, tmp_path: Path) -> None:
    found = factors(llama(), [Q, K])
    turned = {key: tensor.T.contiguous().T for key, tensor in found.items()}
    plain = read_all(opened(base, write_adapter(tmp_path / "a", found)))
    other = read_all(opened(base, write_adapter(tmp_path / "b", turned, form="bin")))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_raw_dump_of_the_whole_model(base: Path, tmp_path: Path) -> None:
    """All of PeftModel.state_dict(): the base's own tensors among it, and originals of saved modules."""
    tensors, found = llama(), factors(llama(), [Q])
    dump = {key.replace(".weight", ".default.weight"): value for key, value in found.items()}
    norm = "model.norm"
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        inside = {Q: "base_layer.", norm: "original_module."}.get(module, "")
        dump[f"{STEM}{module}.{inside}{last}"] = tensor.clone()
    dump[f"{STEM}{norm}.modules_to_save.default.weight"] = torch.full((16,), 3.0)
    whole = read_all(opened(base, write_adapter(tmp_path / "a", dump)))
    plain = read_all(
        opened(base, write_adapter(tmp_path / "b", found | {f"{STEM}{norm}.weight": torch.full((16,), 3.0)}))
    )
    assert all(torch.equal(plain[name], whole[name]) for name in plain)
    assert torch.equal(whole["model.norm.weight"], torch.full((16,), 3.0))


def lone(found: Tensors) -> None:
    del found[f"{STEM}{Q}.lora_B.weight"]


def shard(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_A.weight"] = torch.empty(0)


def flat(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_B.weight"] = torch.ones(64)


def other_rank(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_B.weight"] = torch.ones(16, 3)


def other_size(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_A.weight"] = torch.ones(4, 17)


def other_module(found: Tensors) -> None:
    found |= {key.replace("layers.0", "layers.9"): value.clone() for key, value in found.items()}


def other_method(found: Tensors) -> None:
    found[f"{STEM}{Q}.hada_w1_a"] = torch.ones(4, 4)


def kasa(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_diag.weight"] = torch.ones(4)


def integers(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_A.weight"] = torch.ones(4, 16, dtype=torch.int8)


def two_adapters(found: Tensors) -> None:
    for key in list(found):
        value = found.pop(key)
        found |= {key.replace(".weight", f".{name}.weight"): value.clone() for name in ("one", "two")}


def twice(found: Tensors) -> None:
    found |= {key.removeprefix(STEM): value.clone() for key, value in found.items()}


def unknown(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_A.one.two.weight"] = torch.ones(4, 16)


def magnitude(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_magnitude_vector"] = torch.ones(16)


def no_bias(found: Tensors) -> None:
    found[f"{STEM}{Q}.lora_B.bias"] = torch.ones(16)


def nothing(found: Tensors) -> None:
    found.clear()
    found[f"{STEM}{Q}.original_module.weight"] = torch.ones(2)


REFUSED: dict[str, tuple[Callable[[Tensors], None], tuple[str, ...]]] = {
    "a factor alone": (lone, ("no lora_B of model.layers.0.self_attn.q_proj", "GatheredParameters")),
    "a shard without elements": (shard, ("lora_A.weight' has shape [0]", "ZeRO-3", "summon_full_params")),
    "a flat shard": (flat, ("lora_B.weight' has shape [64]", "FSDP")),
    "ranks that differ": (other_rank, ("q_proj have ranks 4 and 3",)),
    "another size": (other_size, ("16 outputs and 17 inputs", "q_proj.weight is [16, 16]", "base")),
    "a module that is not there": (
        other_module,
        ("adapts 'model.layers.9.self_attn.q_proj', which", "merge_and_unload"),
    ),
    "another method": (other_method, ("hada_w1_a' is of no plain LoRA", "merge_and_unload")),
    "KaSA": (kasa, ("lora_diag.weight' is of no plain LoRA",)),
    "integers": (integers, ("has dtype I8", "save the adapter again")),
    "several adapters": (two_adapters, ("holds several adapters ('one', 'two')", "folder of its own")),
    "a key twice": (twice, ("are the same factor; keep one of them",)),
    "a name of nobody": (unknown, ("lora_A.one.two.weight' has no name that PEFT gives",)),
    "lengths without DoRA": (magnitude, ("lora_magnitude_vector of model.layers.0", "use_dora: false")),
    "a bias that the base has not": (no_bias, ("added to a bias, and", "has no model.layers.0.self_attn.q_proj.bias")),
    "no tensors": (nothing, ("has no tensors",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(base: Path, tmp_path: Path, what: str) -> None:
    edit, fragments = REFUSED[what]
    edit(found := factors(llama(), [Q]))
    with pytest.raises(CheckpointError) as caught:
        opened(base, write_adapter(tmp_path / "a", found))
    for fragment in (*fragments, str(tmp_path / "a")):
        assert fragment in str(caught.value), str(caught.value)


def test_a_rank_that_the_config_does_not_say(base: Path, tmp_path: Path) -> None:
    """Scaled as PEFT would have done, which cannot load it."""
    tensors, found = llama(), factors(llama(), [Q], rank=4)
    checkpoint = opened(base, write_adapter(tmp_path / "a", found, r=8, lora_alpha=4))
    assert "1 modules ('model.layers.0.self_attn.q_proj') have another rank than" in checkpoint.notes[0]
    expected = applied(tensors, found, 4 / 8)[f"{Q}.weight"]
    torch.testing.assert_close(read_all(checkpoint)[f"{Q}.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_dora_without_lengths_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no lora_magnitude_vector of .*q_proj.* says use_dora: true"):
        opened(base, write_adapter(tmp_path / "a", factors(llama(), [Q]), use_dora=True))


KEYS = (
    f"{K}.lora_A.weight", f"{K}.lora_C.weight", f"{K}.lora_magnitude_vector", f"{K}.weight", f"{K}.base_layer.weight",
    f"{K}.lora_embedding_A", f"{K}.token_adapter.trainable_tokens_delta", f"{K}.oft_r", "lm_head.weight",
    "score.weight", f"{K}.modules_to_save.weight", f"{K}.base_layer.lora_A.weight", f"{K}.lora_A.deep.weight",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_used_or_named(base: Path, tmp_path: Path, key: str) -> None:
    """One key more, whatever its name: it changes a tensor, or is named in an error."""
    found = factors(llama(), [Q])
    plain = read_all(opened(base, write_adapter(tmp_path / "a", found)))
    folder = write_adapter(tmp_path / "b", found | {f"{STEM}{key}": torch.full((16, 16), 7.0)})
    said, read = "", plain
    try:
        read = read_all(opened(base, folder))
    except CheckpointError as error:
        said = str(error)
    changed = any(name not in plain or not torch.equal(plain[name], read[name]) for name in read)
    assert changed or K in said, said


class TestFolders:
    def test_what_is_an_adapter(self, base: Path, tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "a", found := factors(llama(), [Q]))
        assert is_adapter(adapter)
        assert is_adapter(adapter / "adapter_model.safetensors")
        assert not is_adapter(base)
        assert not is_adapter(base / "model.safetensors")
        write_adapter(base, found)
        assert not is_adapter(base)  # adapters beside whole weights

    def test_a_file_of_an_adapter_stands_for_it(self, base: Path, tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "a", factors(llama(), [Q]))
        one, two = (read_all(opened(base, path)) for path in (adapter, adapter / "adapter_model.safetensors"))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_factors_in_a_file_of_another_name(self, base: Path, tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "a", factors(llama(), [Q]))
        plain = read_all(opened(base, adapter))
        (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
        assert is_adapter(adapter)
        read = read_all(opened(base, adapter))
        assert all(torch.equal(plain[name], read[name]) for name in plain)

    def test_no_config(self, tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "a", factors(llama(), [Q]))
        (adapter / "adapter_config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no adapter_config\.json, which says how they are scaled"):
            open_adapter(adapter)

    def test_adapters_in_folders_inside(self, tmp_path: Path) -> None:
        for name in ("default", "other"):
            write_adapter(tmp_path / "a" / name, factors(llama(), [Q]))
        assert is_adapter(tmp_path / "a")
        with pytest.raises(CheckpointError, match=r"has adapters in 'default', 'other'; name one of these folders"):
            open_adapter(tmp_path / "a")
