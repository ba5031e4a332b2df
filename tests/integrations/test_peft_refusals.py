"""Live adapters of PEFT that are not merged: what is said, and the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pymerge.errors import ArgumentError, PymergeError
from tests.adapters.test_peft import _quiet, llama, trained
from tests.integrations.test_peft import LLAMA, config, two, weights

peft = pytest.importorskip("peft")
integration = pytest.importorskip("pymerge.integrations.peft")
__all__ = ["_quiet"]


def bad_biases() -> Any:
    return trained(llama(), config(bias="lora_only"))


def bad_kind() -> Any:
    return trained(llama(), peft.LoHaConfig(r=2, target_modules=LLAMA))


def bad_variant() -> Any:
    return trained(llama(), config(alora_invocation_tokens=[1, 2]))


def bad_merged() -> Any:
    model = two()
    model.merge_adapter(["default"])
    return model


def bad_meta() -> Any:
    model = two()
    model.add_adapter("empty", config(), low_cpu_mem_usage=True)
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (two, {"adapters": ["deflaut"]}, "did you mean 'default'"),
        (two, {"adapters": "default"}, "list of names"),
        (two, {"adapters": ["other", "other"]}, "once"),
        (two, {"adapters": []}, "list of names"),
        (two, {"adapter_name": "other"}, "already"),
        (two, {"adapter_name": "a.b"}, "without dots"),
        (two, {"weights": [1.0, 2.0]}, r"weight.* 2 values for 1"),
        (two, {"weights": {"other": 1.0}}, "one for each"),
        (two, {"method": "tise"}, "did you mean 'ties'"),
        (two, {"method": "ties", "densty": 0.5}, "density"),
        (two, {"method": "ties", "density": 0.5}, "--rank"),
        (two, {"rank": 0}, "rank"),
        (two, {"full_tensors": "mrege"}, "error, merge"),
        (llama, {}, "no adapters of PEFT"),
        (bad_biases, {}, "bias='lora_only'.* give full_tensors='skip'"),
        (bad_kind, {}, "LOHA.*save_as_lora"),
        (bad_variant, {}, "activated LoRA"),
        (bad_merged, {}, r"unmerge_adapter\(\)"),
        (bad_meta, {"adapters": ["empty"]}, "meta device"),
        (lambda: trained(llama(), config(modules_to_save=["norm"])), {}, "layernorm.*full-tensors save"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(make: Any, arguments: dict[str, Any], message: str) -> None:
    model = make()
    before, state = weights(model), {name: each.requires_grad for name, each in model.named_parameters()}
    adapters = dict(getattr(model, "peft_config", {}))
    with pytest.raises(PymergeError, match=message):
        integration.add_merged_adapter(
            model, **{"adapters": ["default"], "adapter_name": "new", "method": "task_arithmetic", **arguments}
        )
    assert getattr(model, "peft_config", {}) == adapters
    assert {name: each.requires_grad for name, each in model.named_parameters()} == state
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if not before[name].is_meta)


def test_arguments_are_errors_of_arguments() -> None:
    with pytest.raises(ArgumentError):
        integration.merge_adapters_into(two(), ["nobody"])
