"""The command line as people use it: output, exit codes, interrupted and repeated runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from pymerge.backends.runner import BACKENDS, describe
from pymerge.methods import METHODS
from pymerge.methods.base import PASSES
from tests.helpers.checkpoints import (
    CARRIED,
    llama,
    llama_config,
    load_output,
    pymerge,
    tree,
    write_config,
    write_model,
    write_models,
)

OPTIONS = {
    "merge": (
        "--device --backend --memory --device-memory --max-shard-size --dtype --dry-run --overwrite --profile --quiet "
        "--verbose --adapter --rank --full-tensors --devices --ray --ray-cpus --ray-gpus --part --finalize --log-json "
        "--help"
    ),
    "finalize": (
        "--device --backend --memory --device-memory --max-shard-size --dtype --verify --no-verify --quiet --log-json "
        "--help"
    ),
    "extract": (
        "--base --model --rank --energy --sv-epsilon --max-rank --include --exclude --embeddings --rest --dtype "
        "--algorithm --split --seed --memory --missing-tensors --dry-run --json --overwrite --quiet --log-json "
        "--help"
    ),
    "plan": "--tensors --json --memory --device-memory --max-shard-size --dtype --log-json --help",
    "multi": (
        "--intermediate-dir --device --backend --memory --max-shard-size --dry-run --overwrite --quiet --log-json "
        "--help"
    ),
    "verify": "--allow-nonfinite --deep --quiet --log-json --help",
    "methods": "--help",
    "env": "--help",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base (and the files beside its weights), e0 and e1. Tests write only beside them."""
    folder = tmp_path_factory.mktemp("models")
    base = llama()
    write_models(folder, base, config=llama_config(base))
    return write_model(folder / "base", base, config=llama_config(base), files=CARRIED).parent


@pytest.fixture(scope="module")
def merged(models: Path) -> Path:
    """A task_arithmetic merge in three shards, made by the real command in a real process."""
    config = write_config(models, "task_arithmetic")
    command = [sys.executable, "-m", "pymerge", "merge", str(config), str(models / "merged")]
    done = subprocess.run([*command, "--max-shard-size", "8KB"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "merged 21 tensors (5,456 parameters)" in done.stdout
    return models / "merged"


def squeezed(text: str) -> str:
    """Text on one line, without the frames of tables."""
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", text).split())


@pytest.mark.parametrize("command", OPTIONS)
def test_help_mentions_every_option(command: str) -> None:
    done = pymerge(command, "--help", env={"COLUMNS": "120"})
    assert (done.code, done.err) == (0, "")
    assert set(re.findall(r"(?<!\w)--[a-z][a-z-]+", done.out)) == set(OPTIONS[command].split())


def test_help_lists_every_command() -> None:
    done = pymerge("--help")
    assert done.code == 0
    assert all(re.search(rf"^\W*{command}\s", done.out, re.MULTILINE) for command in [*OPTIONS, "demo"])


def test_an_unknown_command_or_option_is_refused(models: Path) -> None:
    for arguments in (("merg",), ("merge", "--fast", "a", "b"), ("merge", "only-one")):
        done = pymerge(*arguments)
        assert (done.code, done.out) == (2, "")
        assert "Traceback" not in done.err


def test_plan_shows_totals_every_tensor_pattern_and_reasons(models: Path) -> None:
    config = write_config(models, "wudi", iterations=7)
    done = pymerge("plan", config, "--max-shard-size", "8KB")
    assert (done.code, done.err) == (0, "")
    text = squeezed(done.out)
    assert f"base {models / 'base'} expert {models / 'e0'} expert {models / 'e1'}" in text
    assert "21 tensors, 5,456 parameters" in text
    read = 3 * 5456 * 4
    assert f"read {read / 1024:.2f}KiB, write " in text
    assert re.search(r"write [\d.]+KiB in 3 files, compute [\d.]+ MFLOP", text)
    assert re.search(r"tensors held in memory at once: at most [\d.]+KiB, the limit is [\d.]+[GT]iB \(75% of ", text)
    assert re.search(r"reads \d+ pieces? ahead or more, of 512 elements at most; files stay in the page cache", text)
    names = {re.sub(r"\.\d+\.", ".*.", name) for name in load_file(models / "base/model.safetensors")}
    rows = [line.strip("│ ").split("│") for line in done.out.splitlines() if line.startswith("│")]
    assert {row[0].strip() for row in rows} == names
    found = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert found["model.layers.*.mlp.up_proj.weight"][:5] == ["24 x 16", "linear", "wudi", "F32", "2"]
    assert found["model.layers.*.mlp.up_proj.weight"][5:7] == ["9.00KiB", "3.00KiB"]
    assert found["model.norm.weight"][:5] == ["16", "norm", "add task vectors", "F32", "1"]
    assert "head (name): lm_head.weight" in text


def test_dry_run_shows_the_plan_and_writes_nothing(models: Path) -> None:
    config = write_config(models, "wudi")
    before = tree(models)
    limit = ("--memory", "1GiB")  # the default is what the machine has at the moment
    done = pymerge("merge", config, models / "nothing", "--dry-run", *limit)
    assert done.code == 0
    assert done.out == pymerge("plan", config, *limit).out
    assert tree(models) == before
    assert not (models / "nothing").exists()


def test_quiet_prints_nothing(models: Path) -> None:
    config = write_config(models, "linear", more="extra_tensors: ignore")
    for _ in range(2):  # merged, then verified
        done = pymerge("merge", config, models / "quiet", "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")
    done = pymerge("verify", models / "quiet", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_verbose_says_which_backend_computes_and_why(models: Path) -> None:
    config = write_config(models, "linear")
    done = pymerge("merge", config, models / "verbose", "--verbose", "--backend", "reference")
    assert done.code == 0
    assert "combine: backend reference (named)" in done.err
    assert "ops: combine reference" in done.out
    table = done.out[done.out.index("slowest tensors") :].splitlines()
    assert table[1].split() == ["read", "compute", "write", "tensor"]
    assert len(table) == 12
    totals = [sum(map(float, line.split()[:3])) for line in table[2:]]
    assert totals == pytest.approx(sorted(totals, reverse=True), abs=2e-3)


def test_methods_lists_all_methods_and_parameters() -> None:
    done = pymerge("methods")
    assert (done.code, done.err) == (0, "")
    sections = re.split(r"^(?=\w+: )", done.out, flags=re.MULTILINE)
    for method in METHODS.values():
        section = next(part for part in sections if part.startswith(f"{method.name}: "))
        assert squeezed(f"{method.summary} ({method.source})") in squeezed(section)
        rows = re.findall(r"^│(\w+) +│ ?(.*?) *│", section, re.MULTILINE)
        assert [name for name, _ in rows] == [parameter.name for parameter in method.parameters]
        for (_, default), parameter in zip(rows, method.parameters, strict=True):
            assert (default == "required") == parameter.required
    passes = next(part for part in sections if part.startswith("passes: "))
    assert re.findall(r"^│(\w+) +│", passes, re.MULTILINE) == [parameter.name for parameter in PASSES]
    assert squeezed("{lines: [a, b]}") in squeezed(passes)


def test_env_lists_versions_and_backends_with_reasons() -> None:
    interpreter = os.environ.get("TRITON_INTERPRET", "0")  # `describe` below depends on it too
    done = pymerge("env", env={"COLUMNS": "400", "TRITON_INTERPRET": interpreter})
    assert (done.code, done.err) == (0, "")
    assert f"{torch.__version__}" in done.out
    for name, works, reason in describe():
        row = next(line for line in done.out.splitlines() if re.match(rf"│{name} +│ (yes|no)", line))
        assert ("yes" if works else "no") in row
        assert reason.split(",")[0][:60] in row
    assert [name for name, _, _ in describe()] == list(BACKENDS)
    assert "PYMERGE_BACKEND" in done.out


def test_a_merge_is_a_complete_model_directory(models: Path, merged: Path) -> None:
    base = load_file(models / "base/model.safetensors")
    experts = [load_file(models / f"e{number}/model.safetensors") for number in range(2)]
    found = load_output(merged)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        deltas = sum(0.5 * (expert[name].double() - base[name].double()) for expert in experts)
        torch.testing.assert_close(tensor.double(), base[name].double() + deltas, rtol=1e-6, atol=1e-9)
    files = tree(merged)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert sorted(shards) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for shard in shards:
        with safe_open(merged / shard, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    source = tree(models / "base")
    assert {name: files[name] for name in CARRIED} == {name: source[name] for name in CARRIED}
    assert yaml.safe_load(files["config.json"]) == llama_config(base)
    own = {"README.md", "config.json", "pymerge_config.yml", "pymerge_manifest.json"}
    assert files.keys() == own | {"model.safetensors.index.json"} | set(shards) | CARRIED.keys()


def test_the_recipe_and_the_model_card(models: Path, merged: Path) -> None:
    text = (models / "merge.yml").read_text()
    config = write_config(models, "task_arithmetic")
    assert (merged / "pymerge_config.yml").read_bytes() == config.read_bytes()
    config.write_text(text)
    _, front, card = (merged / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["base", "e0", "e1"],
        "library_name": "transformers",
        "tags": ["merge", "pymerge", "task_arithmetic"],
    }
    recipe = card.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(recipe) == yaml.safe_load((merged / "pymerge_config.yml").read_text())
    assert "arXiv 2212.04089" in card


def test_out_dtype_reaches_the_weights_and_config_json(models: Path) -> None:
    config = write_config(models, "linear")
    assert pymerge("merge", config, models / "bf16", "--dtype", "bfloat16").code == 0
    assert {tensor.dtype for tensor in load_output(models / "bf16").values()} == {torch.bfloat16}
    assert yaml.safe_load((models / "bf16/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_same_merge_again_only_verifies(models: Path, merged: Path) -> None:
    config = write_config(models, "task_arithmetic")
    before = {path: path.stat().st_mtime_ns for path in merged.rglob("*")}
    done = pymerge("merge", config, merged, "--max-shard-size", "8KB")
    assert done.code == 0, done
    assert "holds this very merge already; verified 21 tensors" in done.out
    assert {path: path.stat().st_mtime_ns for path in merged.rglob("*")} == before
    # A comment or another order of keys is no other merge.
    config.write_text("# a note\n" + config.read_text())
    assert "verified 21 tensors" in pymerge("merge", config, merged, "--max-shard-size", "8KB").out


def test_verify_names_the_tensor_of_a_flipped_byte(models: Path, merged: Path) -> None:
    done = pymerge("verify", merged)
    assert done.code == 0
    assert "21 tensors, 5,456 parameters, all as written" in done.out
    with safe_open(merged / "model-00002-of-00003.safetensors", "pt") as opened:
        name = opened.keys()[0]
    shard = merged / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    data = bytearray(whole)
    header = int.from_bytes(data[:8], "little")
    first = json.loads(data[8 : 8 + header])[name]["data_offsets"][0]
    data[8 + header + first] ^= 1
    shard.write_bytes(data)
    try:
        done = pymerge("verify", merged)
        assert done.code == 8
        assert len(done.errors) == 1
        assert f"{shard}: tensor {name}: sha256 is" in done.errors[0]
        assert done.errors[0].count("\n- ") == 1
        config = write_config(models, "task_arithmetic")
        done = pymerge("merge", config, merged, "--max-shard-size", "8KB")
        assert done.code == 8
        assert name in done.errors[0]
        assert "--overwrite" in done.errors[0]
    finally:
        shard.write_bytes(whole)


def test_verify_names_a_missing_and_a_changed_file(merged: Path) -> None:
    kept = (merged / "tokenizer.json").read_bytes()
    template = (merged / "chat_template.jinja").read_bytes()
    (merged / "tokenizer.json").unlink()
    (merged / "chat_template.jinja").write_bytes(template + b" ")
    try:
        done = pymerge("verify", merged)
        assert done.code == 8
        assert f"{merged / 'tokenizer.json'}: is missing" in done.errors[0]
        assert f"{merged / 'chat_template.jinja'}: is not as it was written" in done.errors[0]
    finally:
        (merged / "tokenizer.json").write_bytes(kept)
        (merged / "chat_template.jinja").write_bytes(template)


def test_verify_of_something_else(models: Path) -> None:
    for folder in (models / "base", models / "nowhere"):
        done = pymerge("verify", folder)
        assert done.code == 8
        assert len(done.errors) == 1
        assert f"{folder}: has no pymerge_manifest.json" in done.errors[0]


def test_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    base = llama(blocks=1)
    write_models(folder, base, config=llama_config(base))
    config = write_config(folder, "linear")
    for said in ("merged 12 tensors", "verified 12 tensors"):
        done = pymerge("merge", config, folder / "out")
        assert done.code == 0, done
        assert said in done.out
    assert pymerge("verify", folder / "out").code == 0
    (folder / "base" / os.fsdecode(b"\xfe.txt")).touch()
    done = pymerge("merge", config, folder / "other")
    assert done.code == 4
    assert r"\xfe.txt: its name is not valid UTF-8; rename it" in done.errors[0]
