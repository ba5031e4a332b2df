"""Nothing of an adapter is left out in silence: files that PEFT, mlx-lm, diffusers and kohya's names give, with one or
two keys changed. Each tensor is used, or there is an error, or a warning that says what is left out."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pymerge.adapters.folder import is_adapter
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.decoded import DecodedEntry
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.errors import PymergeError
from tests.adapters.test_peft import llama, lora, save, trained
from tests.helpers.adapters import Tensors, opened

WRITTEN = Path(__file__).parent / "written"
# What PEFT itself does not merge: originals of saved modules, and the sampler of MonteCLoRA.
IGNORED = re.compile(r"original_module|lora_monteclora_sampler|_extra_state|trainable_tokens_original")
WORDS = (
    "lora_A", "lora_B", "lora_C", "lora_a", "lora_b", "m", "lora_embedding_A", "lora_magnitude_vector", "lora_down",
    "lora_up", "alpha", "dora_scale", "base_layer", "modules_to_save", "token_adapter", "default", "weight", "bias",
    "hada_w1_a", "lokr_w1", "unet", "text_encoder", "q_proj", "k_proj", "9", "x",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An adapter as it was written: its base, its file's name, tensors and metadata, and its adapter_config.json."""

    base: Path
    file: str
    tensors: Tensors
    metadata: dict[str, str] | None
    config: str | None


def source(base: Path, adapter: Path) -> Source:
    file = adapter if adapter.is_file() else next(adapter.glob("*.safetensors"))
    config = file.parent / "adapter_config.json"
    with safe_open(file, "pt") as opened_file:
        metadata = opened_file.metadata()
    return Source(base, file.name, load_file(file), metadata, config.read_text() if config.exists() else None)


def of_peft(folder: Path, **said: Any) -> Source:
    base = save(llama(), folder / "base")
    trained(llama(), lora(**said)).save_pretrained(folder / "adapter")
    return source(base, folder / "adapter")


SOURCES: dict[str, Callable[[Path], Source]] = {
    "PEFT": lambda folder: of_peft(folder),
    "PEFT, DoRA, tables": lambda folder: of_peft(folder, targets=["q_proj", "embed_tokens"], use_dora=True),
    "PEFT, biases": lambda folder: of_peft(folder, bias="all"),
    "PEFT, added biases": lambda folder: of_peft(folder, targets=["q_proj", "v_proj"], lora_bias=True),
    "PEFT, modules and tokens": lambda folder: of_peft(
        folder, modules_to_save=["norm"], trainable_token_indices=[3, 7], targets=["q_proj"]
    ),
    "mlx-lm": lambda folder: source(WRITTEN / "mlx" / "llama", WRITTEN / "mlx" / "llama-dora"),
    "mlx-lm, experts": lambda folder: source(WRITTEN / "mlx" / "mixtral", WRITTEN / "mlx" / "mixtral-lora"),
    "diffusers": lambda folder: source(
        WRITTEN / "diffusers" / "pipeline" / "unet", WRITTEN / "diffusers" / "before-peft"
    ),
    "diffusers, header": lambda folder: source(
        WRITTEN / "diffusers" / "pipeline" / "text_encoder", WRITTEN / "diffusers" / "header"
    ),
    "kohya": lambda folder: source(
        WRITTEN / "diffusers" / "pipeline" / "text_encoder", WRITTEN / "diffusers" / "kohya.safetensors"
    ),
}


@pytest.fixture(scope="module", params=SOURCES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return SOURCES[request.param](tmp_path_factory.mktemp("source"))


def used(checkpoint: Checkpoint, file: Path) -> set[str]:
    """Keys of an adapter's file that tensors of the model are made of."""
    waiting: list[TensorEntry] = list(checkpoint.tensors.values())
    found = set()
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, DecodedEntry):
            waiting += entry.decoder.parts
        elif entry.file == file:
            found.add(entry.name)
    return found


def copies(written: Source, tensors: Tensors) -> set[str]:
    """Keys of tensors that are the base's own, as PEFT writes tables beside their factors: the base's are taken."""
    own = [value for file in written.base.glob("*.safetensors") for value in load_file(file).values()]
    return {
        key
        for key, value in tensors.items()
        if any(value.shape == each.shape and torch.equal(value, each.to(value.dtype)) for each in own)
    }


def left_out(checkpoint: Checkpoint, keys: set[str]) -> set[str]:
    """Keys of the models of a pipeline that a warning says are left out, with the number of their modules."""
    found: set[str] = set()
    for note in checkpoint.notes:
        if match := re.search(r": (\d+) modules of (\w+) \('.*\) are left out", note):
            own = {key for key in keys if key.startswith((f"{match[2]}.", f"{match[2]}_"))}
            modules = {re.sub(r"\.(lora_|lora\.|alpha).*|_lora\.(down|up).*", "", key) for key in own}
            assert len(modules) == int(match[1])
            found |= own
    return found


def changed(draw: st.DrawFn, tensors: Tensors) -> Tensors:
    """One key renamed, doubled, removed, or with a tensor of another shape."""
    key = draw(st.sampled_from(sorted(tensors)))
    words = re.split(r"(?<=[._])|(?=[._])", key)
    at = draw(st.integers(0, len(words) - 1))
    how = draw(st.sampled_from(["replace", "insert", "drop", "double", "remove", "transpose", "rows", "flat"]))
    value = tensors[key]
    rest = {name: tensor for name, tensor in tensors.items() if name != key}
    word = draw(st.sampled_from(WORDS))
    if how in ("replace", "insert", "drop", "double"):
        new = [*words[:at], *([] if how == "drop" else [word]), *words[at + (how != "insert") :]]
        name = "".join(new) or "x"
        return {**rest, name: value.clone(), **({key: value} if how == "double" else {})}
    if how == "remove":
        return rest
    if how == "transpose":
        return {**rest, key: value.T.clone() if value.ndim == 2 else value[None].clone()}
    return {**rest, key: value.flatten().clone() if how == "flat" else value[:0].clone() if value.ndim else value}


@given(data=st.data())
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_every_tensor_is_used_or_named(written: Source, data: st.DataObject) -> None:
    tensors = written.tensors
    for _ in range(data.draw(st.integers(1, 2))):
        tensors = data.draw(st.composite(changed)(tensors))
    folder = Path(tempfile.mkdtemp())
    try:
        file = folder / written.file
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=written.metadata)
        if written.config is not None:
            (folder / "adapter_config.json").write_text(written.config)
        path = folder if written.config is not None else file
        if not is_adapter(path):  # then it is a model, all of whose tensors count
            return
        said = ""
        try:
            checkpoint = opened(written.base, path)
        except PymergeError as error:
            said = str(error)
        if said:
            assert str(folder) in said
            return
        keys = {name for name in tensors if not IGNORED.search(name)}
        alphas = {name for name in keys if name.endswith(".alpha")}  # numbers, which are in the scales
        assert keys - alphas <= used(checkpoint, file) | left_out(checkpoint, keys) | copies(written, tensors)
    finally:
        shutil.rmtree(folder)


def test_as_they_were_written_all_is_used(written: Source, tmp_path: Path) -> None:
    """What the property says of changed files, of those that are not: none of them is refused."""
    save_file(written.tensors, tmp_path / written.file, metadata=written.metadata)
    if written.config is not None:
        (tmp_path / "adapter_config.json").write_text(written.config)
        assert json.loads(written.config)
    file = tmp_path / written.file
    checkpoint = opened(written.base, tmp_path if written.config is not None else file)
    keys = {name for name in written.tensors if not name.endswith(".alpha")} - copies(written, written.tensors)
    assert used(checkpoint, file)
    assert keys == (used(checkpoint, file) | left_out(checkpoint, set(written.tensors))) & keys
