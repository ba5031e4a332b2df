"""Bad configs and options: one message that names line, value and remedy; no output is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import (
    llama,
    llama_config,
    pymerge,
    refused,
    write_config,
    write_models,
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base, e0, e1 and merge.yml (task_arithmetic)."""
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    write_config(tmp_path, "task_arithmetic")
    return tmp_path


def test_an_unknown_method(models: Path) -> None:
    write_config(models, "task_arithmatic")
    refused(models, 2, models / "merge.yml", ":1:", "'task_arithmatic'", "did you mean 'task_arithmetic'?")


def test_a_missing_weight(models: Path) -> None:
    text = (models / "merge.yml").read_text().partition("parameters:")[0]
    (models / "merge.yml").write_text(text)
    message = refused(models, 2, f"{models / 'merge.yml'}:4:", "'e0'", "'weight'", "add it under this")
    assert f"{models / 'merge.yml'}:5:" in message
    assert "'e1'" in message


def test_all_mistakes_in_a_config_are_listed_with_their_lines(models: Path) -> None:
    (models / "merge.yml").write_text(
        "merge_method: wudi\n"
        "base_modle: base\n"
        "models:\n"
        "  - model: e0\n"
        "  - modle: e1\n"
        "parameters:\n"
        "  iteratoins: 5\n"
        "  lr: fast\n"
        "out_dtype: float8\n"
    )
    message = refused(models, 2)
    lines = {int(line.split(":")[1]): line for line in message.strip().splitlines()}
    assert "did you mean 'base_model'?" in lines[2]
    assert "did you mean 'model'?" in lines[5]
    assert "did you mean 'iterations'?" in lines[7]
    assert "'lr' is 'fast'" in lines[8]
    assert "'float8'" in lines[9]
    assert "'bfloat16'" in lines[9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("", "not a mapping"),
        ("models: [", "not valid YAML"),
        ("merge_method: wudi\nbase_model: base\nmodels: []\n", "models"),
        ("merge_method: wudi\nbase_model: base\nmodels:\n  - model: base\n", "models lists only the base"),
        ("a: !!python/object:os.system x\n", "tag"),
    ],
)
def test_a_config_that_is_none(models: Path, text: str | None, said: str) -> None:
    (models / "merge.yml").unlink()
    if text is not None:
        (models / "merge.yml").write_text(text)
    refused(models, 2, models / "merge.yml", said)


@pytest.mark.parametrize(("backend", "least"), [("native", 384), ("reference", 768)])
def test_a_memory_limit_that_is_too_small(models: Path, backend: str, least: int) -> None:
    # One row of a down_proj, of 24 float32, with base, two experts and the result; in PyTorch four temporaries too.
    said = ("memory", "mlp.down_proj.weight", f"the limit is {least - 1}B", f"give --memory {least}B or more")
    refused(models, 4, *said, args=("--memory", f"{least - 1}B", "--backend", backend))


@pytest.mark.parametrize("size", ["many", "-1", "0", "0.5", "1" + "0" * 400, "5XB"])
@pytest.mark.parametrize("option", ["--memory", "--max-shard-size"])
def test_a_size_that_is_none(models: Path, option: str, size: str) -> None:
    refused(models, 5, f"size {size!r}"[:40], args=(f"{option}={size}",))


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", "meta", "cuda:99"])
def test_a_device_that_is_not_there(models: Path, device: str) -> None:
    remedy = "cpu" if device == "cuda:99" else "choose"
    refused(models, 7, repr(device), remedy, args=("--device", device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the remedy is of a machine without a GPU")
@pytest.mark.parametrize("devices", ["all", "cuda:0", "cuda:0,cuda:1"])
def test_devices_that_are_not_there_name_a_remedy_that_works(models: Path, devices: str) -> None:
    # --device cpu, which a single device is told to use, is refused beside --devices.
    refused(models, 7, "PyTorch sees", "leave --devices out", args=("--devices", devices))


def test_cuda_is_never_replaced_by_the_cpu(models: Path) -> None:
    args = ("--device", "cuda")
    if torch.cuda.is_available():
        done = pymerge("merge", models / "merge.yml", models / "out", *args)
        assert done.code == 0, done
        assert "on the device" in done.out
    else:
        refused(models, 7, "'cuda'", "use --device cpu", args=args)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_named_backend_that_cannot_run_is_never_replaced(models: Path, backend: str) -> None:
    refused(models, 7, f"backend {backend!r} cannot be used", args=("--backend", backend, "--device", "cpu"))


def test_an_unknown_backend(models: Path) -> None:
    done = pymerge("merge", models / "merge.yml", models / "out", "--backend", "jax")
    assert (done.code, done.out) == (2, "")
    assert all(word in done.err for word in ("--backend", "'jax'", "'native'", "'reference'"))
    done = pymerge("merge", models / "merge.yml", models / "out", env={"PYMERGE_BACKEND": "jax"})
    assert done.code == 7
    assert len(done.errors) == 1
    assert "unknown backend 'jax'; choose auto, reference, native" in done.errors[0]
    assert not (models / "out").exists()
