"""The language suite: its readers on small packages, its splits, and the whole pipeline on a small encoder."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import BertConfig

import pymerge
from benchmarks.quality import language_data as data
from benchmarks.quality import language_train
from benchmarks.quality.language_model import SentenceEncoder, cosine_logits, features, make_head, save_encoder
from benchmarks.quality.language_suite import LanguageSuite

pytestmark = pytest.mark.slow

WORDS = 41
RECIPE = language_train.Recipe(length=12, steps=80, lr=1e-2, test=120, validation=100)
CATALOGUE = """
msgid ""
msgstr "Language: de\\n"

#, python-format
msgid "%(name)s was <b>added</b>."
msgstr ""
"%(name)s wurde "
"<b>hinzugefügt</b>."

#, fuzzy
msgid "guess"
msgstr "geraten"

msgid "day"
msgid_plural "days"
msgstr[0] "Tag"

msgid "untranslated"
msgstr ""
"""
CHAPTERS = """<ICD10CM.tabular><chapter><name>1</name><desc>Infections</desc><section>
<diag><name>A00</name><desc>Cholera</desc><diag><name>A00.0</name><desc>Classical cholera</desc></diag></diag>
</section></chapter></ICD10CM.tabular>"""
SYNSETS = """  1 the licence | is not a synset; "x"
00001740 29 v 01 breathe 0 000 | draw air into the lungs; "I can | breathe"; "she breathes"
00002325 38 v 01 go 0 000 | change location
"""


def archive(files: dict[str, bytes]) -> bytes:
    """A gzipped tar of these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as out:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            out.addfile(about, io.BytesIO(content))
    return stream.getvalue()


def test_the_readers_take_class_text_and_group_from_the_packages(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "django-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("django/conf/locale/de/LC_MESSAGES/django.po", CATALOGUE)
        wheel.writestr("django/conf/locale/ja/LC_MESSAGES/django.po", CATALOGUE)
    found = [
        (item.label, " ".join(item.text.split()), " ".join(item.group.split())) for item in data.languages(tmp_path)
    ]
    assert found == [("de", "wurde hinzugefügt .", "was added ."), ("de", "", "untranslated")]

    with zipfile.ZipFile(tmp_path / "simple_icd_10_cm-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("simple_icd_10_cm/data/tabular.xml", CHAPTERS)
    expected = [data.Item("1", "Cholera", "A00"), data.Item("1", "Classical cholera", "A00")]
    assert list(data.diseases(tmp_path)) == expected

    wordnet = {
        "wn-1/wn/data/wordnet-3.0/lexnames": b"03\tnoun.Tops\t1\n29\tverb.body\t2\n38\tverb.motion\t2\n",
        "wn-1/wn/data/wordnet-3.0/data.verb": SYNSETS.encode(),
        "wn-1/wn/data/wordnet-3.0/data.noun": b'00001930 03 n 01 thing 0 000 | an entity; "it was full of rackets"\n',
        "wn-1/wn/data/wordnet-3.0/data.adj": b"",
        "wn-1/wn/data/wordnet-3.0/data.adv": b"",
    }
    (tmp_path / "wn-1.tar.gz").write_bytes(archive(wordnet))
    assert list(data.nouns(tmp_path)) == [data.Item("noun.Tops", "an entity", "an entity")]
    assert [(item.label, item.text) for item in data.kinds(tmp_path)] == [
        ("noun", "an entity"),
        ("verb", "draw air into the lungs"),
        ("verb", "change location"),
    ]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds 0 files wn-\*\.tar\.gz"):
        list(data.nouns(tmp_path))


def items() -> list[data.Item]:
    """Three classes of 200, 150 and 10 texts, in groups of three, the last text of a group like its first."""
    sizes = {"many": 200, "some": 150, "few": 10}
    return [
        data.Item(
            label,
            f"{label} text  {'NUMBER' if i % 3 == 2 else 'number'} {i - i % 3 if i % 3 == 2 else i}",
            f"{label} {i // 3}",
        )
        for label, size in sizes.items()
        for i in range(size)
    ]


def test_no_group_and_no_text_is_on_both_sides_and_the_order_of_files_does_not_matter() -> None:
    classes, parts = data.split(items(), {"train": 160, "held": 1000})
    assert classes == ("many", "some")
    sides = {part: {text for text, _ in texts} for part, texts in parts.items()}
    groups = {part: {(label, int(text.split()[-1]) // 3) for text, label in texts} for part, texts in parts.items()}
    assert not sides["train"] & sides["held"]
    assert not groups["train"] & groups["held"]
    assert all(len(sides[part]) == len(parts[part]) for part in parts)
    assert [label for _, label in parts["train"]] == [0] * 80 + [1] * len([1 for _, label in parts["train"] if label])
    assert not any("NUMBER" in text for part in sides.values() for text in part)
    assert data.split(reversed(items()), {"train": 10**6, "held": 1000})[0] == classes
    unlike = [item for item in items() if "NUMBER" not in item.text]
    assert data.split(reversed(unlike), {"train": 160, "held": 1000}) == (classes, parts)


def test_first_places_have_the_classes_in_equal_shares() -> None:
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 20)
    places = language_train.in_turn(labels, torch.Generator().manual_seed(3))
    assert sorted(places.tolist()) == list(range(75))
    assert labels[places[:15]].bincount().tolist() == [5, 5, 5]
    assert labels[places[15:45]].bincount().tolist() == [15, 0, 15]


def test_batches_draw_every_class_equally_often() -> None:
    labels = torch.tensor([2, 0, 2, 2, 1, 2, 2, 2])
    rng = torch.Generator().manual_seed(0)
    drawn = torch.cat([language_train.draw(labels, 32, rng) for _ in range(200)])
    shares = labels[drawn].bincount() / len(drawn)
    assert torch.allclose(shares, torch.tensor(1 / 3), atol=0.03)
    assert set(drawn.tolist()) == set(range(8))


def small_encoder(seed: int = 0) -> SentenceEncoder:
    """Two layers, 32 wide."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return SentenceEncoder(BertConfig(vocab_size=WORDS, max_position_embeddings=32, **sizes)).eval()


def test_features_are_means_over_words_whatever_a_batch_is_padded_to() -> None:
    model = small_encoder()
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 17, (100,), generator=rng).tolist()
    tokens = torch.zeros(100, 20, dtype=torch.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, WORDS, (length,), generator=rng)
    found = features(model, tokens)
    for row, length, feature in zip(tokens, lengths, found, strict=True):
        alone = super(SentenceEncoder, model).forward(row[None, :length].long()).last_hidden_state
        torch.testing.assert_close(feature, alone[0].mean(0), rtol=0, atol=2e-6)


def test_a_head_is_the_class_means_of_centred_normalised_features() -> None:
    found = torch.randn(40, 8, generator=torch.Generator().manual_seed(2)).double()
    labels = torch.tensor([0] * 10 + [1] * 30)
    mean, head = make_head(found.float(), labels)
    expected_mean = (found[:10].mean(0) + found[10:].mean(0)) / 2  # classes count alike
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-3, atol=1e-4)
    centred = (found - mean.double()) / (found - mean.double()).norm(dim=1, keepdim=True)
    expected = torch.stack([centred[:10].mean(0), centred[10:].mean(0)])
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head.double(), expected, rtol=2e-3, atol=1e-4)
    cosines = centred @ expected.T
    torch.testing.assert_close(cosine_logits(found.float(), mean, head).double(), 16 * cosines, rtol=0, atol=2e-2)


def prepared(root: Path) -> Path:
    """A root that has a small base and texts: a text's class is that of most of its words."""
    root.mkdir()
    model = small_encoder()
    config = root / "config.json"
    model.config.to_json_file(config)
    save_encoder(model, config, root / "base")
    rng = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for number, task in enumerate(data.TASKS):
        for part, n in (("train", 600), ("held", 300)):
            labels = torch.randint(4, (n,), generator=rng)
            words = torch.randint(1, WORDS, (n, 12), generator=rng)
            telling = words % 10 + 10 * ((labels[:, None] + number) % 4) + 1
            tokens = torch.where(torch.rand(n, 12, generator=rng) < 0.4, telling, words)
            tokens[:, 9:] *= torch.rand(n, 3, generator=rng).sort(dim=1, descending=True).values > 0.4
            tensors |= {f"{task}.{part}.tokens": tokens.int(), f"{task}.{part}.labels": labels}
    save_file(tensors, root / "texts.safetensors")
    return root


def made(root: Path) -> LanguageSuite:
    """The suite, trained where it isn't yet."""
    with Progress(disable=True) as progress:
        language_train.make_suite(root, RECIPE, [0], 1, progress)
    return LanguageSuite.trained(root)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> LanguageSuite:
    return made(prepared(tmp_path_factory.mktemp("language") / "small4"))


def test_experts_beat_the_base_on_held_out_texts_and_leave_its_embeddings(suite: LanguageSuite) -> None:
    base = load_file(suite.base() / "model.safetensors")
    examples = load_file(suite.root / "seed-0" / "testset.safetensors")
    right = {"base": 0.0, "experts": 0.0}
    for task in suite.tasks:
        right["base"] += suite.accuracy(suite.base(), task, 0, "test") / 4
        right["experts"] += suite.accuracy(suite.expert(task, 0), task, 0, "test") / 4
        expert = load_file(suite.expert(task, 0) / "model.safetensors")
        same = {name for name, tensor in expert.items() if tensor.equal(base[name])}
        assert {name for name in base if name.startswith(("embeddings.", "pooler."))} <= same
        assert not any(name.endswith("attention.self.query.weight") for name in same)
        parts = [{tuple(row) for row in examples[f"{task}.{part}.tokens"].tolist()} for part in ("test", "validation")]
        assert not parts[0] & parts[1]
    assert right["experts"] > right["base"] + 3


def test_a_broken_run_goes_on_to_the_same_bytes(suite: LanguageSuite, tmp_path: Path) -> None:
    shutil.copytree(suite.root, tmp_path / "broken")
    experts = tmp_path / "broken" / "seed-0" / "experts"
    shutil.rmtree(experts / "nouns")
    (experts / "nouns.partial").mkdir()
    (tmp_path / "broken" / "seed-0" / "testset.safetensors").unlink()
    with pytest.raises(SystemExit, match="no seed with all its experts"):
        LanguageSuite.trained(tmp_path / "broken")
    kept = (experts / "diseases").stat().st_mtime_ns
    assert made(tmp_path / "broken").fingerprint(0) == suite.fingerprint(0)
    assert (experts / "diseases").stat().st_mtime_ns == kept
    assert not (experts / "nouns.partial").exists()


def test_another_recipe_is_refused(suite: LanguageSuite, tmp_path: Path) -> None:
    shutil.copytree(suite.root, tmp_path / "other")
    described = json.loads((tmp_path / "other" / "suite.json").read_text())
    described["recipe"]["steps"] += 1
    (tmp_path / "other" / "suite.json").write_text(json.dumps(described))
    with pytest.raises(SystemExit, match="pass another --work"):
        made(tmp_path / "other")


def test_a_merge_is_measured_with_every_head(suite: LanguageSuite, tmp_path: Path) -> None:
    experts = [{"model": str(suite.expert(task, 0))} for task in suite.tasks]
    config = {"merge_method": "task_arithmetic", "base_model": str(suite.base()), "models": experts}
    pymerge.merge(config | {"parameters": {"weight": 0.0}}, tmp_path / "nothing", progress=False)
    pymerge.merge(config | {"parameters": {"weight": 0.4}}, tmp_path / "merged", progress=False)
    base, nothing, merged = (suite.load(folder) for folder in (suite.base(), tmp_path / "nothing", tmp_path / "merged"))
    examples = load_file(suite.root / "seed-0" / "testset.safetensors")
    for task in suite.tasks:
        assert suite.accuracy(nothing, task, 0, "validation") == suite.accuracy(base, task, 0, "validation")
        tokens, labels = examples[f"{task}.validation.tokens"], examples[f"{task}.validation.labels"]
        one_by_one = torch.cat([features(merged, row[None]) for row in tokens])
        logits = cosine_logits(one_by_one, examples[f"{task}.mean"], examples[f"{task}.head"])
        right = int((logits.argmax(1) == labels).sum())
        assert abs(suite.accuracy(merged, task, 0, "validation") - 100 * right / len(labels)) <= 100 / len(labels)
