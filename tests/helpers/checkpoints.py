"""Tiny checkpoints on disk, and pymerge's command in processes of its own. Without transformers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pymerge.common.dtypes import DTYPES

Tensors = dict[str, Tensor]
# Codes of dtypes that a model's tensors may have; powers of two are read as scales alone.
OF_TENSORS = [code for code in DTYPES if code != "F8_E8M0"]

# Beside the weights, as a model that somebody has downloaded: all of it must be in the merged model too.
CARRIED = {
    "tokenizer.json": '{"version": "1.0", "model": {"type": "BPE", "vocab": {"é": 0}}}',
    "tokenizer_config.json": '{"model_max_length": 64}',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "generation_config.json": '{"temperature":0.7}',
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens":   true}',
}
# PyTorch is imported once, in a process that has done no work; each command is a fork of it.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pytest", "pymerge.api", "pymerge.engine.torch_worker", "pymerge.cli.info_tables"])
# Variables of the surroundings that change what a command prints or chooses.
_NEUTRAL = ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "COLUMNS", "PYMERGE_BACKEND", "TRITON_INTERPRET")


def llama(hidden: int = 16, inner: int = 24, vocabulary: int = 32, blocks: int = 2, tied: bool = False) -> Tensors:
    """Random float32 weights under the names of a Llama model."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for block in range(blocks):
        inside = f"model.layers.{block}."
        shapes |= {f"{inside}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{inside}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{inside}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{inside}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def llama_config(tensors: Tensors, *, tied: bool = False, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that belongs to `llama`."""
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": tensors["model.layers.0.mlp.up_proj.weight"].shape[0],
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name),
        "num_attention_heads": 2,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
    }


def fine_tuned(base: Mapping[str, Tensor], seed: int, scale: float = 1e-3) -> Tensors:
    """An expert: every floating tensor of the base, moved a little."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        noise = torch.randn(tensor.shape, generator=generator)
        return (tensor.float() + scale * noise).to(tensor.dtype)

    return {name: moved(tensor) for name, tensor in base.items()}


def write_model(
    folder: Path,
    tensors: Tensors,
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a model directory: weights in one file or in `shards` with an index, config.json, other files."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(tensors.items())[number::shards])
            save_file(part, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write_models(folder: Path, base: Tensors, *, experts: int = 2, shards: int = 1, **settings: Any) -> Path:
    """Write folder/base and experts folder/e0, folder/e1, ...; `settings` are those of `write_model`."""
    write_model(folder / "base", base, shards=shards, **settings)
    for number in range(experts):
        write_model(folder / f"e{number}", fine_tuned(base, number), shards=shards, **settings)
    return folder


def change(model: Path, edit: Callable[[Tensors], object]) -> None:
    """Load a model of one file, let `edit` change its tensors, and write it again."""
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def write_config(folder: Path, method: str, *, experts: int = 2, more: str = "", **parameters: Any) -> Path:
    """Write folder/merge.yml for the models of `write_models`; returns its path."""
    if method in ("linear", "task_arithmetic"):
        parameters.setdefault("weight", 0.5)
    lines = [f"merge_method: {method}", "base_model: base", "models:"]
    lines += [f"  - model: e{number}" for number in range(experts)]
    if parameters:
        lines += ["parameters:", *(f"  {name}: {json.dumps(value)}" for name, value in parameters.items())]
    path = folder / "merge.yml"
    path.write_text("\n".join([*lines, more]).rstrip() + "\n", encoding="utf-8")
    return path


def load_output(out: Path) -> Tensors:
    """All tensors of a model directory, read by the safetensors library."""
    loaded = [load_file(file) for file in sorted(out.glob("*.safetensors"))]
    return {name: tensor for part in loaded for name, tensor in part.items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in tree(folder).items()}


@dataclass
class Done:
    """Exit code and output of a command; the code of a killed one is minus the signal."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The error messages: each starts a line and goes on to the end."""
        return ("\n" + self.err).split("\nerror: ")[1:]


class Running:
    """A `pymerge` command in a process of its own."""

    def __init__(
        self, arguments: tuple[str, ...], env: Mapping[str, str] | None, before: Callable[[], object] | None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for name in ("stdout", "stderr"):  # here, for a command that is killed before it does anything
            Path(self._folder.name, name).touch()
        details = (arguments, self._folder.name, dict(env or {}), before)
        self._process = _FORKS.Process(target=_main, args=details)
        self._started = time.monotonic()
        self._process.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command, which must still be running."""
        pid = self._process.pid
        assert pid is not None
        assert self._process.is_alive(), self.wait()
        os.kill(pid, number)

    def send_after(self, seconds: float, number: signal.Signals) -> None:
        """Send a signal this long after the start, if the command is then still running."""
        self._process.join(max(0.0, self._started + seconds - time.monotonic()))
        if self._process.exitcode is None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that this command brings about, at most a minute."""
        deadline = time.monotonic() + 60
        while not condition():
            assert self._process.is_alive(), self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def wait(self) -> Done:
        """Wait for the end, at most two minutes."""
        self._process.join(120)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError("pymerge did not end within two minutes")
        files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        texts = [file.read_text(encoding="utf-8", errors="surrogateescape") for file in files]
        self._folder.cleanup()
        return Done(self._process.exitcode, *texts)


def start(
    *arguments: str | Path, env: Mapping[str, str] | None = None, before: Callable[[], object] | None = None
) -> Running:
    """Start `pymerge ARGUMENTS`; `before` (picklable) runs in its process first."""
    return Running(tuple(map(str, arguments)), env, before)


def pymerge(
    *arguments: str | Path, env: Mapping[str, str] | None = None, before: Callable[[], object] | None = None
) -> Done:
    """Run `pymerge ARGUMENTS` to its end."""
    return start(*arguments, env=env, before=before).wait()


def refused(models: Path, code: int, *fragments: object, args: tuple[str, ...] = (), existed: bool = False) -> str:
    """Merge models/merge.yml into models/out; return the one error message, which holds all fragments.

    Nothing may be left of the output, unless it `existed`.
    """
    done = pymerge("merge", models / "merge.yml", models / "out", *args)
    assert len(done.errors) == 1, done
    assert done.code == code, done
    assert "Traceback" not in done.err
    assert done.out == ""
    for fragment in fragments:
        assert str(fragment) in done.errors[0], (fragment, done.err)
    assert existed or not (models / "out").exists()
    return done.errors[0]


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a fresh process and return its result."""
    with _FORKS.Pool(1) as pool:
        return pool.apply(function, arguments)


def _main(arguments: tuple[str, ...], folder: str, env: Mapping[str, str], before: Callable[[], object] | None) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    # Threads waiting for each other on a busy machine would take minutes for these sizes.
    torch.set_num_threads(1)
    # A job in the background of a shell ignores SIGINT, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in _NEUTRAL:
        os.environ.pop(name, None)
    os.environ.update(env)
    sys.argv = ["pymerge", *arguments]
    if before is not None:
        before()
    runpy.run_module("pymerge", run_name="__main__", alter_sys=True)


def lay_apart(folder: Path, name: str) -> None:
    """Make of a model one of torch.save, in which a matrix is stored by columns: that only PyTorch reads."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors[name] = tensors[name].T.contiguous().T
    torch.save(tensors, folder / "pytorch_model.bin")
