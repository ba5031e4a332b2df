"""`pymerge collect`: Grams against those that hooks see in float64, by blocks and whole, resumed, refused."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pymerge.cli.main import app
from pymerge.errors import ArgumentError, CheckpointError, NonFiniteError, OutputError
from pymerge.grams import collect as module
from pymerge.grams.collect import Collected, Settings, collect
from pymerge.grams.data import read_samples
from pymerge.grams.model import Opened, open_model
from pymerge.grams.turns import VisitedTwiceError, run_by_blocks
from tests.helpers.collected import (
    hooked_grams,
    names_in_files,
    save_model,
    save_tokenizer,
    save_vit,
    write_images,
    write_texts,
)

pytest.importorskip("transformers")
FLOAT64 = Settings(256, None, 512, 2, "float64", ())


def run(model: Path, data: Path, out: Path, settings: Settings = FLOAT64) -> Collected:
    return collect(str(model), data, out, settings, device="cpu", progress=False)


def text_inputs(folder: Path, texts: list[str], targets: bool = False) -> list[dict[str, torch.Tensor]]:
    tokenizer = save_tokenizer(folder)

    def ids(text: str) -> torch.Tensor:
        return torch.tensor([tokenizer(text)["input_ids"]])

    return [{"input_ids": ids(text)} | ({"labels": ids(text.split()[0])} if targets else {}) for text in texts]


def hidden(folder: Path) -> list[str]:
    """Names that begin with a dot, as those of work folders do."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_grams_are_those_that_hooks_see_of_one_text_at_a_time(tmp_path: Path, family: str) -> None:
    model = save_model(family, tmp_path / "model")
    texts = write_texts(tmp_path / "data", 6 if family == "t5" else 7)
    if family == "t5":  # every text has a target
        (tmp_path / "data" / "b.txt").unlink()
        texts = texts[:-1]
    found = run(tmp_path / "model", tmp_path / "data", tmp_path / "grams.safetensors")
    grams = load_file(tmp_path / "grams.safetensors")
    names = names_in_files(model, tmp_path / "model")
    seen = hooked_grams(model, text_inputs(tmp_path / "other", texts, family == "t5"))
    expected = {names[own]: gram for own, gram in seen.items() if own in names}  # no tied heads
    assert found.by_blocks
    blocks = {"llama": "model.layers", "gpt2": "h", "bert": "bert.encoder.layer", "t5": "block"}[family]
    assert sum(blocks in name for name in grams) == {"llama": 14, "gpt2": 8, "bert": 12, "t5": 32}[family]
    for name, gram in grams.items():
        assert gram.dtype == torch.float64
        assert torch.equal(gram, gram.mT), name
        torch.testing.assert_close(gram, expected[name], rtol=1e-12, atol=1e-14)
    about = metadata(tmp_path / "grams.safetensors")
    assert about["dtype"] == "float64"
    if family != "t5":
        assert int(about["tokens"]) == sum(len(text.split()) for text in texts)
    assert hidden(tmp_path) == []


def test_images_and_float32(tmp_path: Path) -> None:
    model = save_vit(tmp_path / "model")
    write_images(tmp_path / "data")
    run(tmp_path / "model", tmp_path / "data", tmp_path / "g.safetensors", Settings(4, None, 512, 3, "float32", ()))
    import transformers
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    pictures = [Image.open(path) for path in sorted((tmp_path / "data").iterdir())[:4]]
    inputs = [dict(processor(images=picture, return_tensors="pt")) for picture in pictures]
    names = names_in_files(model, tmp_path / "model")
    expected = {names[own]: gram for own, gram in hooked_grams(model, inputs).items()}
    grams = load_file(tmp_path / "g.safetensors")
    assert len(grams) == 12
    for name, gram in grams.items():
        torch.testing.assert_close(gram.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert metadata(tmp_path / "g.safetensors")["tokens"] == str(4 * 17)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_whole_model_at_once_gives_the_same(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(family, tmp_path / "model")
    write_texts(tmp_path / "data")
    run(tmp_path / "model", tmp_path / "data", tmp_path / "blocks.safetensors")

    def again(*arguments: Any) -> None:
        raise VisitedTwiceError("a block again")

    monkeypatch.setattr(module, "run_by_blocks", again)
    found = run(tmp_path / "model", tmp_path / "data", tmp_path / "whole.safetensors")
    assert not found.by_blocks
    blocks, whole = load_file(tmp_path / "blocks.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert blocks.keys() == whole.keys()
    for name, gram in whole.items():
        torch.testing.assert_close(gram, blocks[name], rtol=1e-12, atol=1e-14)
    assert metadata(tmp_path / "blocks.safetensors") == metadata(tmp_path / "whole.safetensors")


def test_what_was_interrupted_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path / "model")
    write_texts(tmp_path / "data")
    run(tmp_path / "model", tmp_path / "data", tmp_path / "straight.safetensors")
    keep = module.keep
    written: list[str] = []

    def stop_at_the_second(path: Path, *rest: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        keep(path, *rest)

    monkeypatch.setattr(module, "keep", stop_at_the_second)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "model", tmp_path / "data", tmp_path / "out.safetensors")
    assert threading.active_count() == before
    assert not (tmp_path / "out.safetensors").exists()
    first = tmp_path / ".out.collecting" / written[0]
    stamp = first.stat().st_mtime_ns
    seen = []

    def watched(path: Path, *rest: Any) -> None:
        seen.append(path.name)
        keep(path, *rest)
        assert first.stat().st_mtime_ns == stamp

    monkeypatch.setattr(module, "keep", watched)
    run(tmp_path / "model", tmp_path / "data", tmp_path / "out.safetensors")
    assert written[0] not in seen
    assert len(seen) == 2
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


def test_the_whole_model_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("bert", tmp_path / "model")
    write_texts(tmp_path / "data")

    def again(*arguments: Any) -> None:
        raise VisitedTwiceError("a block again")

    monkeypatch.setattr(module, "run_by_blocks", again)
    monkeypatch.setattr(module, "_SECONDS", -1.0)
    run(tmp_path / "model", tmp_path / "data", tmp_path / "straight.safetensors")
    call, calls = module._Collection._call, []

    def stop_at_the_third(self: Any, *rest: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rest)
        call(self, *rest)

    monkeypatch.setattr(module._Collection, "_call", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "model", tmp_path / "data", tmp_path / "out.safetensors")
    later: list[Any] = []
    monkeypatch.setattr(module._Collection, "_call", lambda self, *rest: (later.append(rest), call(self, *rest)))
    run(tmp_path / "model", tmp_path / "data", tmp_path / "out.safetensors")
    assert len(later) == 2  # of four batches
    straight, found = load_file(tmp_path / "straight.safetensors"), load_file(tmp_path / "out.safetensors")
    for name, gram in straight.items():
        torch.testing.assert_close(found[name], gram, rtol=1e-13, atol=1e-15)


def test_a_finished_file_is_kept_and_another_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    write_texts(tmp_path / "data")
    out = tmp_path / "out.safetensors"
    first = run(tmp_path / "model", tmp_path / "data", out)
    there = run(tmp_path / "model", tmp_path / "data", out)
    assert there.found_there
    assert (there.grams, there.tokens) == (first.grams, first.tokens)
    (tmp_path / "data" / "b.txt").write_text("w1 w2")
    with pytest.raises(OutputError, match="exists, and differs in data_sha256"):
        run(tmp_path / "model", tmp_path / "data", out)
    with pytest.raises(OutputError, match=r"differs in .*settings"):
        run(tmp_path / "model", tmp_path / "data", out, Settings(3, None, 512, 2, "float64", ()))


def test_limits_count(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    texts = write_texts(tmp_path / "data")
    lengths = [len(text.split()) for text in texts]
    for name, settings, expected in (
        ("samples", Settings(3, None, 512, 2, "float32", ()), sum(lengths[:3])),
        ("length", Settings(256, None, 4, 2, "float32", ()), sum(min(4, length) for length in lengths)),
        ("tokens", Settings(256, lengths[0] + lengths[1], 512, 2, "float32", ()), lengths[0] + lengths[1]),
    ):
        assert run(tmp_path / "model", tmp_path / "data", tmp_path / f"{name}.safetensors", settings).tokens == expected


def test_experts_in_one_tensor_are_refused_by_name_and_can_be_left_out(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path / "model")
    write_texts(tmp_path / "data")
    with pytest.raises(ArgumentError, match=r"/model: .*model\.layers\.0\.mlp\.experts.*--exclude '\\\.experts\\\.'"):
        run(tmp_path / "model", tmp_path / "data", tmp_path / "out.safetensors")
    assert hidden(tmp_path) == []
    settings = Settings(256, None, 512, 2, "float32", (r"\.experts\.",))
    found = run(tmp_path / "model", tmp_path / "data", tmp_path / "out.safetensors", settings)
    grams = load_file(tmp_path / "out.safetensors")
    assert found.grams == len(grams) == 8
    assert all("self_attn" in name for name in grams)


def test_what_cannot_be_used_is_told(tmp_path: Path) -> None:
    save_model("t5", tmp_path / "model")
    write_texts(tmp_path / "data")
    with pytest.raises(CheckpointError, match="text 7 has no target"):
        run(tmp_path / "model", tmp_path / "data", tmp_path / "out.safetensors")
    write_images(tmp_path / "images")
    with pytest.raises(CheckpointError, match="loads no image processor"):
        run(tmp_path / "model", tmp_path / "images", tmp_path / "out.safetensors")
    (tmp_path / "images" / "a.txt").write_text("w1")
    with pytest.raises(CheckpointError, match=r"holds texts \(a.txt\) and images"):
        run(tmp_path / "model", tmp_path / "images", tmp_path / "out.safetensors")
    (tmp_path / "images" / "a.jsonl").write_text("{}\n")
    for picture in (tmp_path / "images").glob("*.png"):
        picture.unlink()
    with pytest.raises(CheckpointError, match=r"a.jsonl:1: has no text"):
        run(tmp_path / "model", tmp_path / "images", tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match=r"no name of a \.safetensors file"):
        run(tmp_path / "model", tmp_path / "data", tmp_path / "out.bin")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(CheckpointError, match="'NoSuchModel', no model class"):
        run(tmp_path / "model", tmp_path / "data", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert hidden(tmp_path) == []


def test_what_is_kept_outlasts_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path / "model")
    write_texts(tmp_path / "data")
    join, out = module.join, tmp_path / "out.safetensors"

    def fail(*arguments: Any) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(module, "join", fail)
    with pytest.raises(OutputError, match="no space"):
        run(tmp_path / "model", tmp_path / "data", out)
    work = tmp_path / ".out.collecting"
    kept = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert len(kept) == 3
    (tmp_path / "data" / "c.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"c\.txt: is empty"):
        run(tmp_path / "model", tmp_path / "data", out)
    (tmp_path / "data" / "c.txt").unlink()
    assert {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")} == kept
    monkeypatch.setattr(module, "join", join)
    run(tmp_path / "model", tmp_path / "data", out)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_without_grams_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    model = save_model("llama", tmp_path / "model")
    write_texts(tmp_path / "data")
    out = tmp_path / "out.safetensors"
    if whole:
        monkeypatch.setattr(module, "open_model", lambda *given: Opened(open_model(*given).model, None))
    with pytest.raises(ArgumentError, match=r"/model: has no linear weight that --exclude '\.' leaves .* exclude less"):
        run(tmp_path / "model", tmp_path / "data", out, Settings(256, None, 512, 2, "float32", (".",)))
    assert not out.exists()
    assert hidden(tmp_path) == []

    def without_blocks(self: Any, model: Any, batch: Any) -> None:
        """A run that comes to no linear weight."""

    monkeypatch.setattr(module._Collection, "_call", without_blocks)
    names = re.escape("model.layers.0.mlp.down_proj.weight")
    with pytest.raises(ArgumentError, match=rf"/model: none of 14 tensors: {names}.* has inputs on .*/data; give data"):
        run(tmp_path / "model", tmp_path / "data", out)
    assert len([name for name, _ in model.named_parameters() if ".layers." in name and "norm" not in name]) == 14
    assert not out.exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(("name", "content"), [("c.txt", ""), ("c.jsonl", ""), ("c.jsonl", "\n \n")])
def test_an_empty_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    write_texts(tmp_path / "data")
    (tmp_path / "data" / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"/data/{name}: is empty; write a text into it, or remove it"):
        read_samples(tmp_path / "data", 256)
    assert len(read_samples(tmp_path / "data", 7)) == 7  # which come before it


def test_weights_that_are_not_there_count_only_where_they_are_used(tmp_path: Path) -> None:
    """Transformers draws what the files lack at random."""
    save_model("llama", tmp_path / "model")
    write_texts(tmp_path / "data")
    file, out = tmp_path / "model" / "model.safetensors", tmp_path / "out.safetensors"
    whole = load_file(file)
    run(tmp_path / "model", tmp_path / "data", out)
    grams = load_file(out)
    out.unlink()
    # The last norm is used by the head alone, which has no Gram.
    save_file({name: each for name, each in whole.items() if name != "model.norm.weight"}, file, {"format": "pt"})
    run(tmp_path / "model", tmp_path / "data", out)
    for name, gram in load_file(out).items():
        torch.testing.assert_close(gram, grams[name], rtol=1e-9, atol=1e-12)
    out.unlink()
    lost = "model.layers.0.mlp.up_proj.weight"
    save_file({name: each for name, each in whole.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(
        NonFiniteError, match=rf"/model: lacks 1 tensor: {lost}, and inputs of .* not finite; give a model"
    ):
        run(tmp_path / "model", tmp_path / "data", out)
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    with pytest.raises(CheckpointError, match="makes no token of any text"):
        run(tmp_path / "model", tmp_path / "blank", out)
    with pytest.raises(ArgumentError, match=r"--exclude '\(' is not a regular expression"):
        run(tmp_path / "model", tmp_path / "data", out, Settings(256, None, 512, 2, "float32", ("(",)))
    assert not out.exists()


def test_a_run_that_fails_ends_the_others_and_a_block_that_comes_again_is_seen() -> None:
    block = torch.nn.Linear(2, 2)
    before = threading.active_count()

    def fail() -> None:
        block(torch.ones(1, 2))
        raise ValueError("mine")

    def calm() -> None:
        block(torch.ones(1, 2))

    with pytest.raises(ValueError, match="mine"):
        run_by_blocks([calm, fail, calm], {"b": block}, lambda name, passage: passage.through(lambda: None))
    with pytest.raises(VisitedTwiceError, match="b again"):
        run_by_blocks(
            [lambda: block(block(torch.ones(1, 2)))], {"b": block}, lambda _, passage: passage.through(lambda: None)
        )
    assert threading.active_count() == before


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    save_model("bert", tmp_path / "model")
    write_texts(tmp_path / "data")
    arguments = ["collect", *(str(tmp_path / name) for name in ("model", "data", "out.safetensors"))]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert re.search(r"Grams of \d+ tokens \(ran block by block\)", done.output)
    assert "is there already" in CliRunner().invoke(app, [*arguments, "--device", "cpu"]).output
