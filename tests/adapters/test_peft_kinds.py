"""All that PEFT saves and is not read: refused by its type, with remedies that PEFT itself carries out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge.adapters.folder import is_adapter
from pymerge.errors import CheckpointError
from tests.adapters.test_peft import llama, lora, save
from tests.helpers.adapters import opened, read_all

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj"]
MORE: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": []},
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "OFT": {"oft_block_size": 0, "r": 4},
    "BOFT": {"boft_block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "WAVEFT": {"n_frequency": 10},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "MISS": {"r": 4},
    "SHIRA": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1]},
}
# They need another library, or a model with a cache of its own.
LEFT_OUT = {"LORA", "ADAMSS", "ADAPTION_PROMPT", "XLORA"}
KINDS = sorted(kind.value for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in LEFT_OUT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("kinds") / "base")


def config_of(kind: str) -> Any:
    made: Callable[..., Any] = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = set(getattr(made, "__dataclass_fields__"))  # noqa: B009
    said = {"target_modules": TARGETS, "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    return made(**{key: value for key, value in said.items() if key in fields} | MORE.get(kind, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_other_types(kind: str, base: Path, tmp_path: Path) -> None:
    peft.get_peft_model(llama(), config_of(kind)).save_pretrained(tmp_path / "a")
    assert is_adapter(tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        opened(base, tmp_path / "a")
    said = str(caught.value)
    assert f"adapter_config.json: is an adapter of type {kind}" in said.replace(f"'{kind}'", kind)
    if "leave it out" in said:
        return
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "a")
    assert ("save_as_lora" in said) == bool(model.supports_lora_conversion())
    assert "merge_and_unload" in said
    assert model.merge_and_unload().state_dict().keys() == llama().state_dict().keys()


def kasa() -> Any:
    from peft.tuners.lora.config import KasaConfig

    return KasaConfig()


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "alora_invocation_tokens": lambda: {"alora_invocation_tokens": [1, 2]},
    "use_qalora": lambda: {"use_qalora": True, "qalora_group_size": 8},
    "layer_replication": lambda: {"layer_replication": [(0, 2), (1, 3)]},
    "kasa_config": lambda: {"kasa_config": kasa()},
}


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_of_lora(key: str, base: Path, tmp_path: Path) -> None:
    peft.get_peft_model(llama(), lora(TARGETS, **VARIANTS[key]())).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: has {key}: it is .*; (leave it out|apply it)"):
        opened(base, tmp_path / "a")


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_a_base_that_changes_in_training(init: str, base: Path, tmp_path: Path) -> None:
    """As trained it is refused; as PEFT converts it, it is the model that was trained."""
    model = peft.get_peft_model(llama(), lora(TARGETS, init_lora_weights=init))
    config = model.peft_config["default"]
    config.init_lora_weights = True  # as PEFT's guide says, or it would be taken out of the base once more
    model.save_pretrained(tmp_path / "first")
    config.init_lora_weights = init
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    expected = model.merge_and_unload().state_dict()
    with pytest.raises(CheckpointError, match=f"init_lora_weights: {init}, .*path_initial_model_for_weight_") as caught:
        opened(base, tmp_path / "trained")
    for name, tensor in read_all(opened(base, tmp_path / "plain")).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-7)
    if "merge_and_unload" in str(caught.value):  # what the error says besides
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "trained").merge_and_unload().state_dict()
        assert all(torch.allclose(again[name], tensor, rtol=0, atol=1e-5) for name, tensor in expected.items())
    assert ("merge_and_unload" in str(caught.value)) == (init in ("pissa", "olora"))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "corda", "lora_ga"])
def test_a_base_that_changed_in_training_by_folders_alone(init: str, base: Path, tmp_path: Path) -> None:
    """The folder from before training and the one from after make a plain adapter, by what the error says."""
    made = init if init in ("pissa", "olora") else "pissa_niter_4"  # any start is converted alike
    model = peft.get_peft_model(llama(), lora(TARGETS, init_lora_weights=made))
    model.save_pretrained(tmp_path / "first")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "trained")
    expected = model.merge_and_unload().state_dict()
    config = tmp_path / "trained" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": init}))
    with pytest.raises(CheckpointError, match="with init_lora_weights: true in this file, Peft") as caught:
        opened(base, tmp_path / "trained")
    assert f"from_pretrained(BASE, {str(tmp_path / 'trained')!r}).save_pretrained(OUT, path_initial_model" in str(
        caught.value
    )
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": True}))
    peft.PeftModel.from_pretrained(llama(), str(tmp_path / "trained")).save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    for name, tensor in read_all(opened(base, tmp_path / "plain")).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-7)


def test_what_peft_does_not_convert_is_not_advised(base: Path, tmp_path: Path) -> None:
    more = {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    peft.get_peft_model(llama(), lora(TARGETS, **more)).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="merge it where it was trained") as caught:
        opened(base, tmp_path / "a")
    assert "path_initial" not in str(caught.value)
