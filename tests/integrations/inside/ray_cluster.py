"""Merges by Ray, in a process in which it is installed: a head without processors, and two nodes of one each.

The nodes are processes of this machine. What they lose, a worker, a node, is lost as by a power cut.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster

from tests.helpers.checkpoints import change, llama, llama_config, pymerge, start, tree, write_config, write_models

SIZE = ("--max-shard-size", "4KB")
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(**NODE)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = llama()
    return write_models(tmp_path_factory.mktemp("models"), base, config=llama_config(base))


@pytest.fixture(scope="module")
def long_merge(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Arguments, but for the output, of a merge of 9 files of seconds each; `whole` is what it writes."""
    folder = tmp_path_factory.mktemp("long")
    base = {f"model.layers.{number:02d}.mlp.up_proj.weight": torch.eye(128) for number in range(9)}
    write_models(folder, base, config={"model_type": "x"})
    arguments = ("merge", write_config(folder, "wudi", iterations=6000), "--max-shard-size", "60KB")
    assert pymerge(*arguments, folder / "whole").code == 0
    return arguments


def whole(arguments: tuple[str | Path, ...]) -> dict[str, bytes]:
    return tree(Path(arguments[1]).parent / "whole")


def by(cluster: Cluster) -> tuple[str, str]:
    return "--ray", cluster.address


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("linear", {}), ("ties", {"weight": 1.0, "density": 0.5, "scope": "model"}), ("wudi_flow", {})],
)
def test_the_bytes_are_those_of_one_process(
    cluster: Cluster, models: Path, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    config = write_config(models, method, **parameters)
    assert pymerge("merge", config, tmp_path / "one", *SIZE).code == 0
    done = pymerge("merge", config, tmp_path / "out", *SIZE, *by(cluster), "--log-json", tmp_path / "log")
    assert done.code == 0, done
    assert "merged 21 tensors (5,456 parameters)" in done.out
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len({each["node"] for each in events if each["event"] == "shard_finished"}) >= 1
    assert len([each for each in events if each["event"] == "shard_finished"]) == 8


def records(out: Path) -> int:
    return len(list((out / ".pymerge").glob("*.safetensors.json")))


def tasks() -> list[psutil.Process]:
    """Processes that merge a file now."""
    found = psutil.process_iter(["cmdline"])
    return [each for each in found if "pymerge merge_here" in " ".join(each.info["cmdline"] or [])]


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_is_killed_is_replaced(
    cluster: Cluster, long_merge: tuple[str | Path, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    running = start(*long_merge, out, *by(cluster))
    wait_for(lambda: records(out) >= 1 and tasks())
    tasks()[0].kill()
    done = running.wait()
    assert done.code == 0, done
    assert tree(out) == whole(long_merge)


def test_a_node_that_is_lost_is_done_without(
    cluster: Cluster, long_merge: tuple[str | Path, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    third = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    running = start(*long_merge, out, *by(cluster))
    wait_for(lambda: records(out) >= 1)
    cluster.remove_node(third, allow_graceful=False)
    done = running.wait()
    assert done.code == 0, done
    assert tree(out) == whole(long_merge)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_merge_that_is_stopped_goes_on(
    cluster: Cluster, long_merge: tuple[str | Path, ...], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    running = start(*long_merge, out, *by(cluster))
    wait_for(lambda: records(out) >= 2)
    running.send(number)
    done = running.wait()
    assert done.code == code, done
    assert "Traceback" not in done.err
    assert os.listdir(out) == [".pymerge"]
    wait_for(lambda: not tasks())  # Ray ends them when it has noticed
    done = pymerge(*long_merge, out, *by(cluster))
    assert done.code == 0, done
    assert " finished shards of an interrupted run" in done.out
    assert tree(out) == whole(long_merge)


def test_an_error_of_ours_is_told_once_with_its_node(cluster: Cluster, tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    change(tmp_path / "e1", spoil)
    done = pymerge("merge", write_config(tmp_path, "linear"), tmp_path / "out", *SIZE, *by(cluster))
    assert done.code == 6, done
    assert len(done.errors) == 1
    assert done.errors[0].startswith("node ")
    assert "model.norm.weight" in done.errors[0]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("what", ["processor", "version"])
def test_a_node_that_would_make_other_bytes_is_named(cluster: Cluster, models: Path, tmp_path: Path, what: str) -> None:
    """A node with fewer instructions, and one with another version of pymerge."""
    other = {"ATEN_CPU_CAPABILITY": "default"}
    if what == "version":
        # Ray puts the paths of the command first, where the metadata of this checkout may lie.
        (tmp_path / "sitecustomize.py").write_text(
            "from importlib import metadata\n"
            "version = metadata.version\n"
            "metadata.version = lambda name: '9.9' if name == 'pymerge-engine' else version(name)\n"
        )
        other = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    node = cluster.add_node(**NODE, env_vars=other)
    cluster.wait_for_nodes()
    try:
        config = write_config(models, "linear")
        done = pymerge("merge", config, tmp_path / "out", *SIZE, *by(cluster), "--backend", "reference")
    finally:
        cluster.remove_node(node)
    assert done.code in (7, 8), done
    assert len(done.errors) == 1
    assert done.errors[0].startswith("node ")
    assert ("processor (was" if what == "processor" else "pymerge 9.9") in done.errors[0]


@contextmanager
def node_without(cluster: Cluster, hidden: Path) -> Iterator[None]:
    """A node of two processors, all others have one, where this folder is empty: its file system is not mounted."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", cluster.address]
    ray += ["--num-cpus", "2", "--object-store-memory", str(NODE["object_store_memory"])]
    hide = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$1" && shift && "$@"']
    node = subprocess.Popen([*hide, "sh", hidden, *ray], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(each["Resources"].get("CPU") == 2 for each in alive(cluster)))
        yield
    finally:
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            process.kill()
        node.wait()
        wait_for(lambda: not any(each["Resources"].get("CPU") == 2 for each in alive(cluster)))


def alive(cluster: Cluster) -> list[dict[str, Any]]:
    return [node for node in cluster.global_state.node_table() if node["Alive"]]


@pytest.mark.skipif(
    bool(subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True).returncode),
    reason="no mounts of one's own here",
)
def test_a_node_without_the_models_is_named(cluster: Cluster, tmp_path: Path) -> None:
    base = llama()
    models = write_models(tmp_path / "models", base, config=llama_config(base))
    config = write_config(models, "linear")
    with node_without(cluster, models):
        for cpus in ("2", "1"):  # two has only that node, which plans then, too
            done = pymerge("merge", config, tmp_path / "out", *SIZE, *by(cluster), "--ray-cpus", cpus)
            assert done.code in (3, 4), done
            assert len(done.errors) == 1
            assert re.search(f"node .*{models}", done.errors[0])
            assert "Traceback" not in done.err
    done = pymerge("merge", config, tmp_path / "out", *SIZE, *by(cluster))
    assert done.code == 0, done


def test_fifty_files(cluster: Cluster, tmp_path: Path) -> None:
    base = llama(blocks=6)
    config = write_config(write_models(tmp_path, base, config=llama_config(base)), "linear")
    size = ("--max-shard-size", "1KB")
    assert pymerge("merge", config, tmp_path / "one", *size).code == 0
    done = pymerge("merge", config, tmp_path / "out", *size, *by(cluster))
    assert done.code == 0, done
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 50
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_addresses_without_a_cluster(models: Path, tmp_path: Path) -> None:
    config = write_config(models, "linear")
    started = time.monotonic()
    for address, reason in (
        ("127.0.0.1:1", "nothing answers there"),
        ("nowhere", "is not understood"),
        ("ray://127.0.0.1:1", "must run on a machine of the cluster"),
    ):
        done = pymerge("merge", config, tmp_path / "out", "--ray", address)
        assert done.code in (5, 7), done
        assert reason in done.errors[0]
        assert not (tmp_path / "out").exists()
    assert time.monotonic() - started < 180


def test_something_else_than_a_cluster_answers(models: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [server.accept() for _ in range(9)], daemon=True).start()
        started = time.monotonic()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = pymerge("merge", write_config(models, "linear"), tmp_path / "out", "--ray", address)
    assert done.code == 7, done
    assert "nothing answers there (timed out)" in done.errors[0]
    assert time.monotonic() - started < 180


def test_another_server_of_grpc_answers(models: Path, tmp_path: Path) -> None:
    """One that greets as Ray's does, and never says more: Ray itself would try for a quarter of an hour."""

    def serve(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"\0\0\0\4\0\0\0\0\0")
        while connection.recv(1000):
            pass

    def accept() -> None:
        for _ in range(99):
            threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()

    with socket.create_server(("", 0)) as server:  # Ray takes another address of this machine for 127.0.0.1
        threading.Thread(target=accept, daemon=True).start()
        started = time.monotonic()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = pymerge("merge", write_config(models, "linear"), tmp_path / "out", "--ray", address)
    assert done.code == 7, done
    assert "no cluster can be reached" in done.errors[0]
    assert time.monotonic() - started < 180


def test_more_than_a_node_has_is_refused(cluster: Cluster, models: Path, tmp_path: Path) -> None:
    done = pymerge("merge", write_config(models, "linear"), tmp_path / "out", *by(cluster), "--ray-cpus", "64")
    assert done.code == 7, done
    assert "no node has 64 CPUs for a task" in done.errors[0]
