"""What mergekit's own tests import as tests.common, with pymerge in place of mergekit: runs beside mergekit.

mergekit's source distribution has its tests but not this module. The names are those that the tests use. PYMERGE is the
command that merges; without it mergekit's own `run_merge` does, with pymerge as its engine.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
import yaml
from safetensors.torch import load_file

# Methods whose tests give each model a weight that they do not have. mergekit ignores it; pymerge says that it is to be
# deleted, which is done here.
_NO_WEIGHT = ("slerp", "sce", "ram", "ramplus_tl", "model_stock", "arcee_fusion", "nearswap", "karcher")
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


def run_and_check_merge(
    config: Any, check_nan: bool = True, validate: Callable[[str], None] | None = None, **_: Any
) -> None:
    """Merge, look for NaN, and hand the output to `validate`; ValueError with pymerge's words if it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        if "PYMERGE" in os.environ:
            run_command(config, Path(folder, "merge.yml"), out)
        else:
            run_engine(config, out)
        files = sorted(out.glob("*.safetensors"))
        assert files, "no weights were written"
        assert (out / "config.json").exists()
        if check_nan:
            assert not any(bool(tensor.isnan().any()) for each in files for tensor in load_file(each).values())
        if validate is not None:
            validate(str(out))


def run_command(config: Any, file: Path, out: Path) -> None:
    """Merge by pymerge's command."""
    document = _plain(config.model_dump(mode="json", by_alias=True))
    for model in document.get("models", ()) if document["merge_method"] in _NO_WEIGHT else ():
        model.get("parameters", {}).pop("weight", None)
    file.write_text(yaml.safe_dump(document))
    command = [os.environ["PYMERGE"], "merge", str(file), str(out), "--quiet"]
    # The surroundings are mergekit's; pymerge has an environment of its own.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise ValueError(done.stderr)


def run_engine(config: Any, out: Path) -> None:
    """Merge by mergekit's `run_merge` in this process, which is pymerge's."""
    import mergekit.merge
    from mergekit.options import MergeOptions

    from pymerge.errors import PymergeError
    from pymerge.integrations.mergekit import replace_engine

    replace_engine(lenient=True)
    try:
        mergekit.merge.run_merge(config, str(out), MergeOptions(quiet=True))
    except PymergeError as error:
        raise ValueError(str(error)) from error
    assert (out / "pymerge_manifest.json").exists()


def _plain(value: Any) -> Any:
    """A dumped config as a person writes it: nothing for what is not given, names for models."""
    if isinstance(value, dict):
        if set(value) == {"model", "lora", "override_architecture"}:
            return value["model"]["path"]
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _saved(model: Any, path: Any) -> str:
    model.save_pretrained(path)
    return str(path)


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    """A Llama of two layers."""
    return _saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, **_SMALL)), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    """A Granite of two layers."""
    return _saved(transformers.GraniteForCausalLM(transformers.GraniteConfig(vocab_size=vocab_size, **_SMALL)), path)


def make_gpt2size(path: Any, vocab_size: int = 64) -> str:
    """A GPT-2 with as many layers as the smallest published one, and small ones."""
    config = transformers.GPT2Config(vocab_size=vocab_size, n_ctx=64, n_positions=64, n_embd=32, n_layer=12, n_head=4)
    return _saved(transformers.GPT2LMHeadModel(config), path)


def make_picoLlaVa(path: Any, vocab_size: int = 64) -> str:
    """A LLaVA: a CLIP tower and a Llama of two layers each."""
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=16, **_SMALL)
    text = transformers.LlamaConfig(vocab_size=vocab_size, **_SMALL)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocab_size - 1)
    return _saved(transformers.LlavaForConditionalGeneration(config), path)
