"""Merges of live adapters that fail on the way leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pymerge.errors import NonFiniteError
from tests.adapters.test_peft import _quiet
from tests.integrations.test_peft import integration, peft, two, weights

__all__ = ["_quiet"]


def test_nan_is_named_and_nothing_is_left() -> None:
    model = two()
    keys = set(model.state_dict())
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        integration.add_merged_adapter(model, ["default", "other"], "merged")
    assert set(model.state_dict()) == keys
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r"adapter default.*lora_B"):
        integration.merge_adapters_into(model, ["default", "other"])
    after = weights(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name].nan_to_num(9), before[name].nan_to_num(9))] == []
    assert "default" in model.peft_config
    with pytest.raises(NonFiniteError, match=r"adapter default.*lora_B.*overwritten are \d+ tensors: .*layers\.0"):
        integration.merge_adapters_into(model, ["default", "other"], atomic=False)


def test_a_failure_of_peft_leaves_no_half_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    keys = set(model.state_dict())
    update = peft.tuners.lora.Linear.update_layer
    made = []

    def fail(self: Any, name: str, *args: Any, **more: Any) -> None:
        made.append(name)
        if len(made) == 3:
            raise RuntimeError("no memory")
        update(self, name, *args, **more)

    monkeypatch.setattr(peft.tuners.lora.Linear, "update_layer", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        integration.add_merged_adapter(model, ["default", "other"], "merged")
    assert set(model.state_dict()) == keys
    assert "merged" not in model.peft_config
    monkeypatch.undo()
    integration.add_merged_adapter(model, ["default", "other"], "merged")
