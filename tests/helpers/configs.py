"""Configs as text, and the problems that reading one names."""

from __future__ import annotations

from typing import Any

import pytest

from pymerge.config.merge_config import load_config
from pymerge.errors import ConfigError

WUDI = "merge_method: wudi\nbase_model: base\nmodels:\n  - model: a\n  - model: b\n"
TASK_ARITHMETIC = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - model: a
    parameters:
      weight:
        - filter: self_attn
          value: [0.0, 0.5, 1.0]
        - filter: mlp
          value: 0.25
  - model: b
parameters:
  weight:
    - {filter: Embed, value: 3}
    - {filter: "*", value: 0.75}
  lambda: 0.5
dtype: bfloat16
tokenizer_source: base
"""


def problems(source: Any) -> list[str]:
    """Lines of the error that loading `source` raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value).splitlines()
