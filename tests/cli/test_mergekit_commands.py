"""`pymerge mergekit-yaml` and `mergekit-multi`: mergekit's command lines, where mergekit is not installed."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge.cli.mergekit import HELP, multi_command, yaml_command
from pymerge.config.document import from_mapping
from pymerge.errors import ArgumentError, ConfigError, OutputError
from pymerge.integrations.mergekit.options import Options
from tests.helpers.checkpoints import CARRIED, llama, llama_config, load_output, tree, write_models
from tests.helpers.checkpoints import pymerge as pymerge_command

RECIPE = "# mine\nmerge_method: ties\nbase_model: base\nparameters: {weight: 0.5, density: 0.5}\n"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = llama()
    write_models(tmp_path, base, experts=3, config=llama_config(base), files=CARRIED)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/merge.yml").write_text(RECIPE + "models: [{model: e0}, {model: e1}]\r\n", newline="")
    monkeypatch.chdir(tmp_path)  # to which mergekit's names are relative, not to the config
    return tmp_path


def test_mergekit_is_not_imported(models: Path) -> None:
    yaml_command(["configs/merge.yml", "out", "--quiet"])
    assert "mergekit" not in sys.modules
    assert (models / "out/mergekit_config.yml").read_bytes() == (models / "configs/merge.yml").read_bytes()
    ours = pymerge.merge("configs/merge.yml", "ours", device="cpu", progress=False)
    assert ours.tensors == len(load_output(models / "out"))
    assert tree(models / "ours").keys() ^ tree(models / "out").keys() == {"mergekit_config.yml"}
    same = [name for name, digest in tree(models / "ours").items() if tree(models / "out")[name] == digest]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(same)


def test_every_option_is_taken_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert HELP.keys() == {field.name for field in fields(Options)}
    for command in (yaml_command, multi_command):
        with pytest.raises(SystemExit) as stopped:
            command(["--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        for field in fields(Options):
            flag = {"verbosity": "-v"}.get(field.name, "--" + field.name.replace("_", "-"))
            assert flag in shown
            if isinstance(field.default, bool) and field.name != "gpu_rich":
                assert f"--no{flag[1:]}" in shown
    assert "--lazy" in shown
    assert "-I" in shown


def test_options_that_need_nothing_change_nothing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idle = ["--low-cpu-memory", "--lazy-unpickle", "--clone-tensors", "--read-to-gpu", "--async-write"]
    idle += ["--write-threads", "4", "--lora-merge-cache", "here", "-v", "-v", "--safe-serialization"]
    yaml_command(["configs/merge.yml", "out", "--quiet"])
    yaml_command(["configs/merge.yml", "again", *idle])
    assert tree(models / "out") == tree(models / "again")
    assert "no effect" not in capsys.readouterr().err
    yaml_command(
        ["configs/merge.yml", "third", "--allow-crimes", "--trust-remote-code", "--lora-merge-dtype", "float16"]
    )
    said = capsys.readouterr().err
    assert all(f"{name} has no effect" in said for name in ("allow_crimes", "trust_remote_code", "lora_merge_dtype"))


def test_options_that_change_something(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    yaml_command(["configs/merge.yml", "out", "--quiet", "--no-copy-tokenizer", "--no-write-model-card", "-j", "1"])
    names = {each.name for each in (models / "out").iterdir()}
    assert names.isdisjoint({"README.md", "mergekit_config.yml", "tokenizer.json", "chat_template.jinja"})
    assert "generation_config.json" in names
    yaml_command(["configs/merge.yml", "parts", "--quiet", "--out-shard-size", "4k"])
    assert (models / "parts/model.safetensors.index.json").exists()
    whole, parts = load_output(models / "out"), load_output(models / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    (models / "drawn.yml").write_text(RECIPE.replace("ties", "dare_ties") + "models: [{model: e0}, {model: e1}]\n")
    drawn = []
    for seed in ("1", "1", "2"):
        yaml_command(["drawn.yml", "drawn", "--quiet", "--random-seed", seed])
        drawn.append(load_output(models / "drawn")["lm_head.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-safe-serialization"], "safetensors only"),
        (["-j", "0"], "num_threads is 0"),
    ],
)
def test_options_that_are_refused(models: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        yaml_command(["configs/merge.yml", "out", *arguments])
    assert not (models / "out").exists()


@pytest.mark.parametrize("arguments", [["--out-shard-size", "5GB"], ["--nonsense"], ["--cud"], []])
def test_command_lines_that_mergekit_would_not_understand(models: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        yaml_command(["configs/merge.yml", *(["out", *arguments] if arguments else [])])
    assert stopped.value.code == 2


def test_errors_have_the_lines_of_the_file(models: Path) -> None:
    (models / "wrong.yml").write_text(RECIPE + "models: [{model: e0}]\ntokenizer_source: 3\nmerge_metod: x\n")
    with pytest.raises(ConfigError, match=r"wrong\.yml:7: unknown key 'merge_metod'; did you mean 'merge_method'"):
        yaml_command(["wrong.yml", "out", "--random-seed", "3"])


def test_an_output_is_replaced_by_another_merge_and_kept_by_the_same(models: Path) -> None:
    yaml_command(["configs/merge.yml", "out", "--quiet"])
    first = (models / "out/model.safetensors").stat()
    yaml_command(["configs/merge.yml", "out", "--quiet"])
    assert (models / "out/model.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    (models / "other.yml").write_text(RECIPE + "models: [{model: e0}, {model: e2}]\n")
    yaml_command(["other.yml", "out", "--quiet"])
    assert (models / "out/mergekit_config.yml").read_text().endswith("{model: e2}]\n")
    (models / "out/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        yaml_command(["configs/merge.yml", "out", "--quiet"])


def test_several_merges(models: Path) -> None:
    (models / "configs/all.yml").write_text(
        f"name: first\n{RECIPE}models: [{{model: e0}}, {{model: e1}}]\n---\n"
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: first}, {model: e2}]\n"
    )
    words = ["configs/all.yml", "-I", "parts", "--out-path", "out", "--quiet", "--lazy-unpickle"]
    multi_command(words)
    written = {path: (models / path).stat().st_mtime_ns for path in ("parts/first/config.json", "out/config.json")}
    multi_command(words)
    assert written == {path: (models / path).stat().st_mtime_ns for path in written}
    multi_command([*words, "--no-lazy"])
    assert all((models / path).stat().st_mtime_ns > time for path, time in written.items())
    yaml_command(["configs/merge.yml", "alone", "--quiet"])
    first, alone = load_output(models / "parts/first"), load_output(models / "alone")
    assert all(torch.equal(tensor, alone[name]) for name, tensor in first.items())
    assert str(models / "parts/first") in (models / "out/mergekit_config.yml").read_text()
    with pytest.raises(ArgumentError, match="no folder for the document without a name"):
        multi_command(["configs/all.yml", "-I", "parts"])


def test_tokenizer_and_vocabulary_are_mergekits(models: Path) -> None:
    """Rows beyond the tokens are cut off; with other tables than the base's the rows of all are merged."""
    config = Options(unsafe_truncate_embeddings=True)
    document = from_mapping({"merge_method": "linear", "models": [{"model": "e0"}], "tokenizer_source": "e0"}, "x")
    config.adjust(document)
    assert document.data["tokenizer"] == {"source": "e0", "pad_to_multiple_of": 1}
    assert "tokenizer_source" not in document.data
    assert "pad_to_multiple_of: 1" in document.text
    plain = from_mapping({"merge_method": "linear", "models": [{"model": "e0"}]}, "x")
    config.adjust(plain)
    assert plain.data["vocabulary"] == "base"
    assert any("vocabulary: base" in warning for warning in config.warnings)


def test_the_commands_are_pymerges(models: Path) -> None:
    done = pymerge_command("mergekit-yaml", "configs/merge.yml", "out")
    assert (done.code, done.errors) == (0, [])
    assert "merged" in done.out
    done = pymerge_command("mergekit-yaml", "nowhere.yml", "out")
    assert done.code == 2
    assert [error.count("\n") for error in done.errors] == [1]
    assert pymerge_command("mergekit-multi", "--help").code == 0
