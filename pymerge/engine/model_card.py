"""The model card of an output: README.md with the recipe, for the output's readers and for model hubs."""

from __future__ import annotations

from typing import Any

import yaml

from pymerge import env
from pymerge.planner.plan import Plan

RECIPE_NAME = "pymerge_config.yml"


def model_card(plan: Plan) -> bytes:
    """README.md of the output: how it was made, with the recipe, in the form that model hubs read."""
    config = plan.config
    models = [str(entry.model) for entry in config.models]
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys([*([config.base_model] if config.base_model else []), *models])),
        "library_name": "transformers",
        "tags": ["merge", "pymerge", config.merge_method],
    }
    base = f"Base model: `{config.base_model}`\n\n" if config.base_model else ""
    listed = "\n".join(f"- `{model}`" for model in models)
    adapters = [expert for expert in plan.inputs.experts if expert.base is not None]
    if adapters:
        names = ", ".join(f"`{expert.path.name}`" for expert in adapters)
        listed += f"\n\nApplied as adapters (LoRA): {names}."
    origins = [f"`{checkpoint.origin}`" for checkpoint in plan.inputs.all if checkpoint.origin]
    if origins:
        listed += f"\n\nFrom the Hugging Face Hub: {', '.join(origins)}."
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# Merged model

Made with pymerge {env.version()} by `{plan.method.name}`: {plan.method.summary} ({plan.method.source}).

{base}Models merged:

{listed}

{plan.parameters:,} parameters. {plan.extras.note}The recipe (also in `{RECIPE_NAME}`):

```yaml
{config.source_text.strip()}
```
""".encode("utf-8", "backslashreplace")
