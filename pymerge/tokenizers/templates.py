"""Chat templates: the built-in ones under mergekit's names, and the most common one among models.

mergekit's alpaca, exaone and llama3 differ from those here in line breaks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

TEMPLATE_FILE = "chat_template.jinja"

_ALPACA = """\
{%- for message in messages if message['role'] == 'system' -%}
{%- if loop.last -%}{{ message['content'] | trim }}{%- endif -%}
{%- endfor -%}
{{ '\\n\\n' }}
{%- set headings = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} -%}
{%- for message in messages if message['role'] in headings -%}
{{ '### ' + headings[message['role']] + ':\\n' + message['content'] | trim }}
{%- if not loop.last -%}{{ '\\n\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
{{ ('' if messages[-1]['role'] == 'system' else '\\n\\n') + '### Response:\\n' }}
{%- endif -%}
"""
_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_EXAONE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}
{{ '[|' + message['role'] + '|]' + message['content'] }}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}
"""
_LLAMA3 = """\
{%- for message in messages -%}
{%- if loop.first -%}{{ bos_token }}{%- endif -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
_MISTRAL = """\
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{{ bos_token }}
{%- for message in turns -%}
{%- if message['role'] not in ('user', 'assistant') -%}
{{ raise_exception('role ' + message['role'] + ': write user and assistant turns, after at most one system message') }}
{%- elif message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
{{ raise_exception('user and assistant must take turns, the user first') }}
{%- elif message['role'] == 'user' -%}
{{ ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
BUILTIN = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}


def own_template(files: Mapping[str, bytes]) -> str | None:
    """The chat template of a model's tokenizer files: chat_template.jinja, or that of tokenizer_config.json."""
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode()
    found: Any = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    if isinstance(found, list):
        named = {part.get("name"): part.get("template") for part in found if isinstance(part, dict)}
        found = named.get("default")
    elif isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def choose_template(wanted: str, models: Iterable[Mapping[str, bytes]]) -> str | None:
    """The template that `chat_template` means: of "auto" the most common of the models' (the first of them where two
    are as common), None if no model has one."""
    if wanted != "auto":
        return BUILTIN.get(wanted, wanted)
    found = [template.strip() for files in models if (template := own_template(files))]
    return Counter(found).most_common(1)[0][0] if found else None
