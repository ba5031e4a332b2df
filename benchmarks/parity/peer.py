"""The half of the parity check that runs in mergekit's environment: makes small models, and merges with mergekit.

    python peer.py make FOLDER
    python peer.py run JOBS.json

A job is {"config": YAML file, "out": folder, "seed": number or null}; the answer to each is a line of JSON on standard
output: null, or what mergekit raised. One process does all jobs: importing it takes longer than a small merge.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

EXPERTS = 3
# Added tokens of base, e1, e2, e3 in the family "words".
TOKENS = ((), ("<a>", "<b>"), ("<b>", "<c>"), ("<c>",))
_SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def architectures() -> dict[str, Any]:
    """Family -> a model with random weights."""
    llama = transformers.LlamaConfig(**_SIZES, intermediate_size=80, num_key_value_heads=2, tie_word_embeddings=False)
    gpt2 = transformers.GPT2Config(vocab_size=96, n_embd=48, n_layer=4, n_head=4, n_positions=64)
    bert = transformers.BertConfig(**_SIZES, intermediate_size=80, max_position_embeddings=64)
    moe = transformers.Qwen3MoeConfig(
        **_SIZES,
        intermediate_size=80,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        head_dim=12,
        tie_word_embeddings=False,
    )
    return {
        "llama": transformers.LlamaForCausalLM(llama),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "bert": transformers.BertForMaskedLM(bert),
        "qwen_moe": transformers.Qwen3MoeForCausalLM(moe),
    }


def make(folder: Path) -> None:
    """Write FAMILY/base and FAMILY/e1 to e3 in float32, and the same in bfloat16 under FAMILY-bf16."""
    torch.manual_seed(0)
    make_words(folder)
    for family, model in architectures().items():
        for parameter in model.parameters():  # norms and biases, too: all ones or zeros tell nothing
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for number in range(EXPERTS + 1):
            for name, parameter in model.named_parameters():
                parameter.data.copy_(base[name])
                if number:
                    parameter.data.add_(torch.randn_like(parameter), alpha=2e-3 * number)
            name = f"e{number}" if number else "base"
            save(model, folder / family / name)
            save(copy.deepcopy(model).to(torch.bfloat16), folder / f"{family}-bf16" / name)


def words(number: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model of the family "words": plain words that all have, and added tokens."""
    vocabulary = {
        token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(3, 40))])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(list(TOKENS[number]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_words(folder: Path) -> None:
    """Write the family "words": Llamas whose token tables have the rows of their tokenizers, as many as these need."""
    base: dict[str, torch.Tensor] = {}
    for number in range(EXPERTS + 1):
        tokenizer = words(number)
        sizes = {**_SIZES, "vocab_size": len(tokenizer), "intermediate_size": 80, "num_key_value_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
        for name, parameter in model.named_parameters():
            if number == 0:
                base[name] = parameter.data.clone()
            else:
                noise = torch.randn_like(base[name]) * 2e-3 * number
                parameter.data[: len(base[name])] = base[name] + noise
        name = f"e{number}" if number else "base"
        for place, dtype in ((folder / "words", torch.float32), (folder / "words-bf16", torch.bfloat16)):
            copy.deepcopy(model).to(dtype).save_pretrained(place / name)
            tokenizer.save_pretrained(place / name)


def save(model: Any, folder: Path) -> None:
    """Write a model as mergekit 0.1.5 can read it."""
    model.save_pretrained(folder)
    if isinstance(model, transformers.Qwen3MoeForCausalLM):
        # transformers writes a file for each expert's matrices, which mergekit would stack; both read stacks here.
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    if isinstance(model, transformers.BertForMaskedLM):
        # mergekit's own description of BERT ends in a TypeError; that of a name it doesn't know is inferred.
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["SmallBertModel"]}))


def run(jobs: list[dict[str, Any]]) -> None:
    """Carry out the jobs, in order."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    for job in jobs:
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=job["seed"])
        problem = None
        try:
            document = yaml.safe_load(Path(job["config"]).read_text())
            run_merge(MergeConfiguration.model_validate(document), job["out"], options)
        except (Exception, AssertionError) as error:  # whatever it is, it is the answer
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        print("answer " + json.dumps(problem), flush=True)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        run(json.loads(Path(sys.argv[2]).read_text()))
