"""Connection to a Ray cluster, and what its nodes have."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pymerge.common.libraries import require
from pymerge.errors import ArgumentError, BackendError

_ADDRESS = re.compile(r"([^:/]+|\[[^]]+\]):([0-9]{1,5})")
_TIMEOUT = 20.0  # seconds for a port to answer
_TRIES = "2"
# What a client of HTTP/2 says first, with empty settings; the server's own come back, a frame of this kind.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS = b"\4"
OBJECT_STORE = 80 << 20  # weights are never in it; what a plan takes is far less
# Of a task's memory, what is not tensors: Python, PyTorch and the code of both.
PROCESS_BYTES = 400 << 20


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to Ray during a block: its own cluster ("local"), the one of this machine ("auto"), or an address.

    One that this process has already is used, and left open. Raises ArgumentError where Ray is not installed, and
    BackendError where there is no cluster, or one of another version.
    """
    require("ray")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    elif address != "auto":
        _check_port(address)
    try:
        with nullcontext() if address == "local" else _few_tries():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"ray {address}: no cluster can be reached ({reason}); start one (ray start --head), or give local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _few_tries() -> Iterator[None]:
    """Have Ray give up soon where a server answers that is none of its own: a try takes 40 s, and it would make 20."""
    name = "RAY_gcs_server_port_wait_time_s"
    given = os.environ.get(name)
    os.environ.setdefault(name, _TRIES)
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(name, None)


def _check_port(address: str) -> None:
    """Raise unless a server like Ray's answers there: Ray itself would wait for minutes."""
    if address.startswith("ray://"):
        raise ArgumentError(
            f"ray {address}: the command must run on a machine of the cluster: with auto, or by ray job submit"
        )
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ArgumentError(f"ray address {address!r:.80} is not understood; give local, auto or HOST:PORT")
    try:
        answer = _greet(found[1].strip("[]"), int(found[2]))
    except (OSError, OverflowError) as error:
        raise BackendError(
            f"ray {address}: nothing answers there ({error}); give the address that ray start --head printed"
        ) from error
    if answer[3:4] != _SETTINGS:
        raise BackendError(
            f"ray {address}: what answers there is no Ray cluster; give the address that ray start --head printed"
        )


def _greet(host: str, port: int) -> bytes:
    """The first frame that a server of gRPC, as Ray's is, answers to a client. Raises OSError."""
    with socket.create_connection((host, port), timeout=_TIMEOUT) as connection:
        connection.sendall(_GREETING)
        return connection.recv(9)


def memory_of_a_task(cpus: float, gpus: float) -> int:
    """Bytes that each of as many tasks as a node takes at once can have, on the node where that is least.

    Raises BackendError where no node has so many processors or GPUs.
    """
    import ray

    shares = []
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        tasks = has.get("CPU", 0) // cpus
        if gpus:
            tasks = min(tasks, has.get("GPU", 0) // gpus)
        if tasks >= 1:
            shares.append(int(has.get("memory", 0) // tasks))
    if not shares:
        wanted = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise BackendError(f"ray: no node has {wanted} for a task; give fewer (--ray-cpus, --ray-gpus)")
    return min(shares)


def node_name() -> str:
    """Name of the node that a task runs on."""
    import ray

    return f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]}, process {os.getpid()})"
