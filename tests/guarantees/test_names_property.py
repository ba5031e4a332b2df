"""Random models under the names that versions and tools give them: the merge by name in float64, or an error."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pymerge import api
from pymerge.errors import PymergeError
from tests.helpers.checkpoints import load_output, write_model
from tests.helpers.renamed_models import (
    BEGINNINGS,
    EMBEDDING,
    HIDDEN,
    Form,
    Model,
    Parts,
    Tensors,
    config_of,
    constants_of,
    shapes_of,
)

EXAMPLES = 2000 if os.environ.get("PYMERGE_TORTURE") == "1" else 120
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

PARTS = st.builds(
    Parts,
    blocks=st.integers(1, 3),
    mixture=st.booleans(),
    tower=st.booleans(),
    convolution=st.booleans(),
    pooler=st.booleans(),
    prediction=st.booleans(),
    tied=st.booleans(),
)
FORMS = st.builds(
    Form,
    beginning=st.sampled_from(["plain", *BEGINNINGS]),
    old_norms=st.booleans(),
    new_convolution=st.booleans(),
    stacked=st.booleans(),
    words=st.sampled_from(["gate_proj", "w1"]),
)
# What happens to an expert beyond its form: it lacks tensors, has others, or others in place of some.
ACCIDENTS = st.sampled_from(["none", "none", "none", "lacks", "heads", "others", "impostor", "twice"])
MASKS = st.sampled_from(["same", "same", "none", "longer"])


class Case:
    """A merge: models, config, and what must come of it."""

    def __init__(self, draw: Any) -> None:
        self.parts = draw(PARTS)
        self.tied = draw(st.sampled_from([True, None])) if self.parts.tied else False
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.method = draw(st.sampled_from(["linear", "task_arithmetic"]))
        self.stand_in = draw(st.booleans())
        self.ignore = draw(st.booleans())
        self.dtype = draw(st.sampled_from([None, *DTYPES]))
        self.weights = [0.3, 0.9][: draw(st.integers(1, 2))]
        self.base_again = self.method == "task_arithmetic" and draw(st.booleans())
        self.certain = True  # it must be merged: nothing is odd about it
        self.base = self.model(draw, "none")
        self.experts = [self.model(draw, draw(ACCIDENTS)) for _ in self.weights]

    def model(self, draw: Any, accident: str) -> Model:
        shapes = shapes_of(self.parts)
        weights = {name: torch.randn(shape, generator=self.generator) for name, shape in shapes.items()}
        masks = draw(MASKS)
        constants = constants_of(self.parts, 11 if masks == "longer" else 8) if masks != "none" else {}
        form, dtype = draw(FORMS), draw(st.sampled_from(DTYPES))
        model = Model(weights, constants, form, dtype, head_copy=self.parts.tied and draw(st.booleans()))
        single = sorted(name for name in weights if ".mlp." not in name and name != EMBEDDING)
        chosen = draw(st.lists(st.sampled_from(single), min_size=1, max_size=3, unique=True))
        if accident in ("lacks", "impostor"):
            dropped = {name: weights.pop(name) for name in chosen}
            self.certain &= self.stand_in
            if accident == "impostor":  # of the shape of what is missing, in a module of another name
                self.certain = False
                for name, tensor in dropped.items():
                    words = name.split(".")
                    words[-2] = "impostor"
                    model.others[".".join(words)] = 9 * torch.ones_like(tensor)
        elif accident == "heads":
            model.others |= {"classifier.dense.weight": 9 * torch.ones(HIDDEN, HIDDEN)}
            model.others |= {"classifier.out_proj.weight": torch.ones(2, HIDDEN), "score.weight": torch.ones(3, HIDDEN)}
        elif accident == "others":
            model.others |= {
                "value.dense.weight": 9 * torch.ones(HIDDEN, HIDDEN),
                "value.dense.bias": torch.ones(HIDDEN),
            }
            self.certain &= self.ignore
        elif accident == "twice":
            self.certain = False
            copy = draw(st.sampled_from(["copy.", "ema.", "teacher.model.", "module."]))
            model.others |= {f"{copy}{name}": 9 * torch.ones_like(weights[name]) for name in chosen}
        return model

    def write(self, folder: Path) -> Path:
        config = config_of(self.parts, self.tied)
        write_model(folder / "base", self.base.stored(), config=config)
        for number, expert in enumerate(self.experts):
            write_model(folder / f"stored{number}", expert.stored(), config=config)
            (folder / f"e{number}").symlink_to(folder / f"stored{number}")
        (folder / "link").symlink_to(folder / "base")
        models = [
            {"model": f"e{number}", "parameters": {"weight": weight}} for number, weight in enumerate(self.weights)
        ]
        models += [{"model": "link", "parameters": {"weight": 5.0}}] if self.base_again else []
        raw: dict[str, Any] = {"merge_method": self.method, "base_model": "base", "models": models}
        raw |= {"missing_tensors": "base"} if self.stand_in else {}
        raw |= {"extra_tensors": "ignore"} if self.ignore else {}
        raw |= {"dtype": CODES[self.dtype]} if self.dtype else {}
        (folder / "merge.yml").write_text(yaml.safe_dump(raw))
        return folder / "merge.yml"

    def expected(self) -> Tensors:
        """The output by plain names in float64, under the names of the base."""
        found = {name: self._merged(name) for name in self.base.weights}
        return self.base.form.store(found | {name: tensor.double() for name, tensor in self.base.constants.items()})

    def _merged(self, name: str) -> torch.Tensor:
        base = self.base.values(name)
        have = [name in expert.weights for expert in self.experts]
        if not any(have):
            return base
        values = [expert.values(name) if there else base for expert, there in zip(self.experts, have, strict=True)]
        if self.method == "linear":
            total = sum(weight * each for weight, each in zip(self.weights, values, strict=True))
            return total / sum(self.weights)
        return base + sum(weight * (each - base) for weight, each in zip(self.weights, values, strict=True))


def check(case: Case) -> str:
    """Merge, and compare with what must come of it; returns what did."""
    with tempfile.TemporaryDirectory() as folder:
        config = case.write(Path(folder))
        try:
            api.merge(config, Path(folder) / "out", device="cpu", progress=False)
        except PymergeError:
            if case.certain:
                raise
            return "error"
        found = load_output(Path(folder) / "out")
    expected = case.expected()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(
            tensor.double(), expected[name], rtol=2 * eps, atol=4 * eps, msg=lambda text, n=name: f"{n}: {text}"
        )
    # What may not be merged otherwise: all that an expert lacks was said to be the base's.
    assert case.stand_in or all(expert.weights.keys() == case.base.weights.keys() for expert in case.experts)
    return "merged"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_a_merge_is_that_by_name_or_an_error(data: st.DataObject) -> None:
    case = Case(data.draw)
    outcome = check(case)
    event(outcome)


@pytest.mark.parametrize("beginning", sorted(BEGINNINGS))
def test_every_form_is_merged(beginning: str) -> None:
    """What the random models could miss: each beginning on both sides, with all else differing too."""

    for base, expert in ((Form(), Form(beginning, True, True, True)), (Form(beginning, True, True, True), Form())):
        case = Case.__new__(Case)
        case.parts = Parts(2, mixture=True, tower=True, convolution=True, pooler=True)
        case.tied, case.method, case.stand_in, case.ignore, case.dtype = False, "task_arithmetic", False, False, None
        case.weights, case.base_again, case.certain = [0.5], True, True
        generator = torch.Generator().manual_seed(1)
        models = [
            Model(
                {n: torch.randn(s, generator=generator) for n, s in shapes_of(case.parts).items()},
                constants_of(case.parts),
                form,
            )
            for form in (base, expert)
        ]
        case.base, case.experts = models[0], models[1:]
        assert check(case) == "merged"
