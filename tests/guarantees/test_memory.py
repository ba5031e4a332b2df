"""Memory that a merge really holds: within the plan's bound and a limit of the system, whatever the checkpoint."""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.harness import processes
from pymerge import api
from pymerge.engine.memory import Heap
from pymerge.planner import budget
from tests.helpers.checkpoints import in_process, lay_apart, load_output, write_config, write_model, write_models
from tests.helpers.factored import write_products
from tests.helpers.quantised import four_bit

MIB = 2**20
# 4 MiB in float32: base, two experts and the output of a layer are 16 MiB together.
ROWS, COLUMNS = 4096, 256
LAYER_BYTES = 4 * 4 * ROWS * COLUMNS
FEW, MANY = 12, 24
# Python's objects, thread stacks, headers: what a merge holds beside tensors.
BESIDE_TENSORS = 8 * MIB


class Peak(NamedTuple):
    """In bytes: how far the resident set grew during a merge, and what the plan promised for tensors."""

    grown: int
    planned: int


def resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def warm_up(folder: Path) -> None:
    """Merge a small model, which loads libraries and starts threads."""
    torch.set_num_threads(1)
    api.merge(folder / "small/merge.yml", folder / "small/out", device="cpu", progress=False, overwrite=True)


def measure(folder: Path, settings: dict[str, Any]) -> Peak:
    """Merge the large model under observation."""
    warm_up(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set so far is now the present one
    before = resident("VmRSS")
    api.merge(folder / "merge.yml", folder / "out", device="cpu", progress=False, overwrite=True, **settings)
    return Peak(resident("VmHWM") - before, api.plan(folder / "merge.yml", device="cpu", **settings).peak_memory)


def measured(folder: Path, **settings: Any) -> Peak:
    peak: Peak = in_process(measure, folder, settings)
    return peak


def write_layers(folder: Path, layers: int, method: str, *, shards: int = 1, **parameters: Any) -> Path:
    for place, count in ((folder / "small", 1), (folder, layers)):
        names = [f"model.layers.{number:02d}.mlp.up_proj.weight" for number in range(count)]
        tensors = {name: 0.1 * torch.randn(ROWS, COLUMNS) for name in names}
        write_models(place, tensors, shards=shards if place == folder else 1)
        write_config(place, method, **parameters)
    return folder


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}),
        ("ram", {}),
        ("ties", {"weight": 0.5, "density": 0.5}),
        ("wudi", {"iterations": 2}),
        ("ace", {"gamma_threshold": 100}),
    ],
)
def test_more_layers_need_no_more_memory(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    few = measured(write_layers(tmp_path / "few", FEW, method, **parameters))
    many = measured(write_layers(tmp_path / "many", MANY, method, **parameters))
    assert few.planned == many.planned
    # Holding one of the four tensors of each layer would be 25 percent of what was added. How far the threads come
    # ahead of each other, within the plan, is chance.
    assert many.grown - max(few.grown, 0.9 * few.planned) < 0.2 * (MANY - FEW) * LAYER_BYTES
    assert few.grown <= few.planned + BESIDE_TENSORS
    assert many.grown <= many.planned + BESIDE_TENSORS


# Factors of long sides, of which there are two in a block: rank 16 of two adapters together, and 64 of eight.
LONG, SHORT, RANK = 2**15, 256, 8


def write_adapters(folder: Path, method: str, adapters: int) -> Path:
    """A base of two blocks, and adapters of all of its weights; one block to warm up."""
    for place, count in ((folder / "small", 1), (folder, 2)):
        names = [f"model.layers.{number}.mlp.{side}_proj.weight" for number in range(count) for side in ("up", "down")]
        shapes = [(LONG, SHORT) if "up" in name else (SHORT, LONG) for name in names]
        base = {name: torch.randn(shape).bfloat16() for name, shape in zip(names, shapes, strict=True)}
        write_model(place / "base", base)
        for number in range(adapters):
            products = {n: (torch.randn(len(t), RANK), torch.randn(RANK, t.shape[1])) for n, t in base.items()}
            write_products(place / f"e{number}", place / "base", products)
        write_config(place, method, experts=adapters)
    return folder


@pytest.mark.parametrize("method", ["task_arithmetic", "ace", "tsv_m"])
def test_more_adapters_need_little_more_memory(tmp_path: Path, method: str) -> None:
    """Of each weight that is worked on the factors are held once, in float32, and a product as large; of the next one
    too, which is solved meanwhile. How far the threads come ahead of each other is chance."""
    few = measured(write_adapters(tmp_path / "few", method, 2))
    many = measured(write_adapters(tmp_path / "many", method, 8))
    added = 4 * 6 * RANK * (LONG + SHORT)
    assert many.grown - few.grown < 4 * added
    assert many.grown <= many.planned + BESIDE_TENSORS


@pytest.mark.parametrize(("method", "few"), [("task_arithmetic", 1), ("ace", 3)])
def test_eight_adapters_take_a_tenth_more_memory_at_most(tmp_path: Path, method: str, few: int) -> None:
    """Of all that the process takes, with the sides of a model of 1.2 billion parameters. How far threads come ahead of
    each other is chance, and so is some of a peak."""
    sides = {"up": (8192, 2048), "down": (2048, 8192)}
    base = {f"model.layers.0.mlp.{side}_proj.weight": torch.randn(shape).bfloat16() for side, shape in sides.items()}
    write_model(tmp_path / "base", base)
    for number in range(8):
        products = {name: (torch.randn(len(t), 16), torch.randn(16, t.shape[1])) for name, t in base.items()}
        write_products(tmp_path / f"e{number}", tmp_path / "base", products)
    peaks: dict[int, list[int]] = {few: [], 8: []}
    for _ in range(2):
        for count, found in peaks.items():
            config = write_config(tmp_path, method, experts=count)
            command = [sys.executable, "-m", "pymerge", "merge", config, tmp_path / "out", "--overwrite", "--quiet"]
            found.append(processes.run(command, processes.variables()).peak)
    assert min(peaks[8]) < 1.1 * max(peaks[few])


def test_one_large_shard_needs_as_much_as_many_small_ones(tmp_path: Path) -> None:
    folder = write_layers(tmp_path / "one", MANY, "task_arithmetic")
    one = measured(folder)
    many = measured(folder, max_shard_size=5 * MIB)
    parts = measured(write_layers(tmp_path / "parts", MANY, "task_arithmetic", shards=6))
    assert one.planned == many.planned == parts.planned
    # What is held at a moment depends on how far the threads have come; never more than what was planned.
    assert max(one.grown, many.grown, parts.grown) <= one.planned + BESIDE_TENSORS
    assert len(list((folder / "out").glob("*.safetensors"))) == MANY


@pytest.mark.parametrize("method", ["task_arithmetic", "ram"])
@pytest.mark.parametrize("limit", [8 * MIB, 24 * MIB])
def test_a_limit_is_kept(tmp_path: Path, limit: int, method: str) -> None:
    folder = write_layers(tmp_path, MANY, method)
    peak = measured(folder, memory=limit)
    assert peak.planned <= limit
    assert peak.grown <= 1.1 * limit + BESIDE_TENSORS


@pytest.mark.parametrize("kind", ["FP8", "NF4"])
@pytest.mark.parametrize("limit", [8 * MIB, 24 * MIB])
def test_decoding_keeps_a_limit(tmp_path: Path, limit: int, kind: str) -> None:
    """Rows of NF4 are long, and cut blocks; of FP8 many are decoded at once."""
    shape = (ROWS, COLUMNS) if kind == "FP8" else (15, ROWS * COLUMNS // 16 + 5)
    generator = torch.Generator().manual_seed(0)
    for place, count in ((tmp_path / "small", 1), (tmp_path, MANY)):
        for model in ("base", "e0", "e1"):
            tensors: dict[str, torch.Tensor] = {}
            for number in range(count):
                name = f"model.layers.{number:02d}.mlp.up_proj.weight"
                if kind == "NF4":
                    tensors |= four_bit(shape, name=name, seed=number).stored
                    continue
                codes = torch.randint(0, 120, shape, generator=generator, dtype=torch.uint8)
                tensors |= {name: codes.view(torch.float8_e4m3fn), f"{name}_scale": torch.full((shape[0], 1), 0.001)}
            write_model(place / model, tensors)
        write_config(place, "task_arithmetic")
    plan = api.plan(tmp_path / "merge.yml", device="cpu", memory=limit)
    assert all(entry.decoded_from for step in plan.steps for entry in step.inputs)
    peak = measured(tmp_path, memory=limit)
    assert peak.planned <= limit
    assert peak.grown <= 1.1 * limit + BESIDE_TENSORS


@pytest.mark.parametrize("room", [0, 24 * MIB])
def test_native_code_beside_one_step_of_pytorch(tmp_path: Path, room: int) -> None:
    """The first of the layers is read by PyTorch, and reduced there; without room beside it no native thread works."""
    folder = write_layers(tmp_path, FEW, "ties", weight=0.5, density=0.5)
    name = "model.layers.00.mlp.up_proj.weight"
    for place in (folder / "small", folder):
        lay_apart(place / "e1", name)
    steps = api.plan(folder / "merge.yml", device="cpu").steps
    assert {step.name for step in steps if step.worker == "torch"} == {name}
    least = max(step.footprint(step.smallest).peak for step in steps)
    peak = measured(folder, memory=least + room)
    assert peak.planned <= least + room
    assert peak.grown <= peak.planned + BESIDE_TENSORS


def test_solvers_keep_to_the_least_limit_that_the_plan_names(tmp_path: Path) -> None:
    folder = write_layers(tmp_path, FEW, "wudi_flow")
    step = api.plan(folder / "merge.yml").steps[0]
    least = step.footprint(step.pieces[0]).peak
    peak = measured(folder, memory=least)
    assert peak.planned == least
    assert peak.grown <= 1.1 * least + BESIDE_TENSORS


def test_a_large_tensor_is_never_whole_in_memory(tmp_path: Path) -> None:
    rows = 120_000  # 120 MiB of float32 that task_arithmetic reads in row ranges of 6 MiB
    write_models(tmp_path, {"model.embed_tokens.weight": torch.ones(rows, 256)}, experts=3)
    plan = api.plan(write_config(tmp_path, "task_arithmetic", experts=3))
    assert len(plan.steps[0].pieces) == 20
    (tmp_path / "small").mkdir()
    write_models(tmp_path / "small", {"model.embed_tokens.weight": torch.ones(300, 256)}, experts=3)
    write_config(tmp_path / "small", "task_arithmetic", experts=3)
    peak = measured(tmp_path)
    assert peak.grown <= peak.planned + BESIDE_TENSORS


def write_holes(folder: Path, layers: int) -> None:
    """A float32 model of zeros that takes no space on the disk."""
    size = 4 * ROWS * COLUMNS
    fields = {
        f"model.layers.{number:02d}.mlp.up_proj.weight": {
            "dtype": "F32",
            "shape": [ROWS, COLUMNS],
            "data_offsets": [number * size, (number + 1) * size],
        }
        for number in range(layers)
    }
    header = json.dumps(fields).encode()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + layers * size)


# Stacks of the threads that a merge starts (8 MiB of addresses each, of which little is used), and of their heaps.
THREADS = 64 * MIB


def merge_under_a_limit(folder: Path, limit: int) -> int:
    """Merge while the system refuses this process more memory; returns the bytes of its inputs."""
    warm_up(folder)
    Heap(limit).trim()
    allowed = resident("VmData") + limit + THREADS
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    try:
        torch.empty(2 * (limit + THREADS), dtype=torch.uint8)
    except RuntimeError:
        pass
    else:
        raise AssertionError("the system does not keep to the limit")
    report = api.merge(folder / "merge.yml", folder / "out", device="cpu", progress=False, memory=limit)
    return report.bytes_read


def test_inputs_ten_times_the_allowed_memory_are_merged(tmp_path: Path) -> None:
    layers, limit = 84, 32 * MIB
    write_layers(tmp_path / "any", 1, "task_arithmetic")
    (tmp_path / "any/small").rename(tmp_path / "small")
    for name in ("base", "e0", "e1"):
        write_holes(tmp_path / name, layers)
    write_config(tmp_path, "task_arithmetic")
    read: int = in_process(merge_under_a_limit, tmp_path, limit)
    assert read == 3 * layers * 4 * ROWS * COLUMNS
    assert read > 10 * (limit + THREADS)
    assert not any(tensor.any() for tensor in load_output(tmp_path / "out").values())


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


GIB = 2**30
V2_STAT = "anon 1000\nactive_file 100\ninactive_file 20\n"
V1_STAT = "cache 7\nactive_file 1\ninactive_file 1\ntotal_active_file 100\ntotal_inactive_file 20\n"


@pytest.mark.parametrize(
    ("group", "files", "room"),
    [
        # v2: the group itself, an ancestor with less, the mounted root of a container.
        ("0::/a/b", {"a/b/memory.max": "50000", "a/b/memory.current": "9000", "a/b/memory.stat": V2_STAT}, 41120),
        (
            "0::/a/b",
            {
                "a/b/memory.max": "max",
                "a/b/memory.current": "9000",
                "a/memory.max": "20000",
                "a/memory.current": "9000",
            },
            11000,
        ),
        ("0::/../x", {"memory.max": "50000", "memory.current": "9000"}, 41000),
        # v1, in a container that sees another path than its own.
        (
            "4:memory:/docker/1\n0::/",
            {
                "memory/memory.limit_in_bytes": "50000",
                "memory/memory.usage_in_bytes": "9000",
                "memory/memory.stat": V1_STAT,
            },
            41120,
        ),
        ("0::/a", {"a/memory.max": "50", "a/memory.current": "90"}, 0),
    ],
)
def test_limits_of_cgroups(tmp_path: Path, group: str, files: dict[str, str], room: int) -> None:
    proc = fill(tmp_path / "proc", {"self/cgroup": group + "\n"})
    assert budget.available_bytes(proc, fill(tmp_path / "groups", files)) == room


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/a", {"a/memory.max": "max", "a/memory.current": "90"}),
        ("0::/a", {}),
        ("", {}),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096), "memory/a/memory.usage_in_bytes": "1"}),
        ("3:cpu:/a", {"memory/a/memory.limit_in_bytes": "10", "memory/a/memory.usage_in_bytes": "1"}),
    ],
)
def test_without_a_limit_the_machine_decides(tmp_path: Path, group: str, files: dict[str, str]) -> None:
    proc = fill(tmp_path / "proc", {"self/cgroup": group})
    found = budget.available_bytes(proc, fill(tmp_path / "groups", files))
    assert found > 64 * MIB
    assert found == pytest.approx(budget.available_bytes(), rel=0.2)


def test_the_budget_of_a_cpu() -> None:
    cpu = torch.device("cpu")
    given = budget.budget(cpu, 3 * GIB)
    assert (given.host, given.tensors, given.origin) == (3 * GIB, 3 * GIB, "--memory")
    default = budget.budget(cpu)
    assert default.tensors == int(0.75 * default.available)
    assert default.origin.startswith("75% of ")
    assert default.keeps_cache(3 * default.available // 4)
    assert not default.keeps_cache(3 * default.available // 4 + 1)
