"""Text of configs: what is YAML, how much of it, and which line a problem is on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pymerge.config.merge_config import load_config, resolve
from pymerge.methods import get_method
from tests.helpers.configs import WUDI, problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WUDI + "models: []\n", "config:6: key 'models' stands twice, first on line 3; remove one"),
        (WUDI + "1: x\n", "config:6: a key is not a text; put it in quotes"),
        (WUDI + "---\nmerge_method: ace\n", "config:6: more than one YAML document"),
        ("a: [1\nb: 2\n", "config:2: not valid YAML"),
        ("a:\n\t- b\n", "config:2: not valid YAML: found character '\\t' that cannot start any token; replace tabs"),
        ('a: "C:\\Users"\nb: 1\n', "; write / for \\, or use single quotes"),
        (
            "a: !!python/object/apply:os.system [ls]\nb: 1\n",
            "config:1: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not",
        ),
        (
            "a: !secret x\nb: 1\n",
            "config:1: could not determine a constructor for the tag '!secret'; use plain YAML",
        ),
        ("a: &a [*a]\nb: 1\n", "nested too deeply"),
        ("a: " + "[" * 1000 + "\n", "nested too deeply"),
        ("a: &a {<<: *a}\nb: 1\n", "nested too deeply"),
        ("a: 2024-13-45\nb: 1\n", "config:1: '2024-13-45' cannot be read"),
        ("a: " + "9" * 5000 + "\n", "cannot be read"),
        ("a: \x00\n", "not YAML"),
    ],
)
def test_yaml_problem(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems(text)), problems(text)


def test_alias_bomb_and_large_files_are_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert "more than 50000 values" in problems(bomb)[0]
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
    assert "more than 50000 values" in problems(merges)[0]
    large = tmp_path / "large.yml"
    large.write_text("#" * (1 << 20) + "\n")
    assert "is too large for a config" in problems(large)[0]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin1.yml").write_bytes(b"a: \xe9\n")
    assert "cannot be read (No such file or directory)" in problems(tmp_path / "none.yml")[0]
    assert "not a file" in problems(tmp_path)[0]
    assert "not UTF-8 text (byte 3)" in problems(tmp_path / "latin1.yml")[0]


def test_aliases_and_merge_keys_work() -> None:
    config = load_config(
        "merge_method: linear\nmodels:\n  - &a {model: a, parameters: &p {weight: 2}}\n"
        "  - {<<: *a, model: b}\n  - {model: c, parameters: {<<: [*p], weight: 1e-1}}\n"
    )
    values = resolve(config, get_method("linear"), "w", 0.0, [0, 1, 2])
    assert values.model["weight"] == (2.0, 2.0, 0.1)


def test_numbers_are_yaml_1_2() -> None:
    for text, number in (("1e-5", 1e-5), ("2.5E3", 2500.0), (".5e1", 5.0), ("1.0e-5", 1e-5), ("3", 3.0)):
        config = load_config(WUDI + f"parameters: {{lr: {text}}}\n")
        assert resolve(config, get_method("wudi"), "w", 0.0, [0]).merge["lr"] == number


def test_long_values_are_cut() -> None:
    assert len(problems(WUDI + f"extra_tensors: {'x' * 5000}\n")[0]) < 450
