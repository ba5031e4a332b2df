"""Extras of a WEMoE directory: routers, task vectors, their index and wemoe.json, beside the plain checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

from pymerge.output.layout import ShardLayout, layout_file
from pymerge.planner.extras import Extras
from pymerge.wemoe.router_file import ROUTER_NAME, described_routers
from pymerge.wemoe.spec import SPEC_NAME, Spec, spec_bytes
from pymerge.wemoe.task_vector_jobs import router_steps, task_vector_steps
from pymerge.wemoe.task_vector_layout import TaskVectorFile, weight_map
from pymerge.wemoe.task_vectors import INDEX_NAME, index_bytes


def make_extras(spec: Spec, seed: int, files: Sequence[TaskVectorFile]) -> Extras:
    """The extras of a build; `spec` is without the stored size, which they add."""
    routers = layout_file(ROUTER_NAME, list(chain.from_iterable(described_routers(spec))))
    return Extras(
        steps=(*router_steps(spec, seed), *task_vector_steps(files)),
        layouts=(routers, *(file.layout for file in files if file.exact)),
        late={file.file: file.reserve for file in files if not file.exact},
        changeable=(ROUTER_NAME,),
        identity=_identity(spec, seed, files),
        note=_note(spec),
        files=partial(_small_files, spec),
    )


def _identity(spec: Spec, seed: int, files: Sequence[TaskVectorFile]) -> Mapping[str, str]:
    listed = [(file.file, [parameter.name for parameter in file.parameters]) for file in files]
    fields = spec.model_dump(mode="json", exclude_none=True)
    modules = json.dumps([fields.pop("modules"), listed])
    parts = {f"wemoe {key}": json.dumps(value) for key, value in fields.items()}
    return parts | {"wemoe seed": str(seed), "wemoe modules": hashlib.sha256(modules.encode()).hexdigest()}


def _note(spec: Spec) -> str:
    kind = spec.storage.kind.replace("_", "-")
    return (
        f"{len(spec.modules)} of its modules mix {spec.tasks} experts for every input (WEMoE, arXiv 2402.00433; {kind} "
        "task vectors): load it with `pymerge.wemoe.load`, or as a plain model in which they are the base's. "
    )


def _small_files(spec: Spec, beside: Sequence[ShardLayout]) -> dict[str, bytes]:
    """The index of the task vectors, and wemoe.json with the size that they have."""
    layouts = [layout for layout in beside if layout.file != ROUTER_NAME]
    stored = sum(tensor.nbytes for layout in layouts for tensor in layout.tensors)
    storage = spec.storage.model_copy(update={"stored_bytes": stored})
    return {
        INDEX_NAME: index_bytes(weight_map(layouts), stored),
        SPEC_NAME: spec_bytes(spec.model_copy(update={"storage": storage})),
    }
