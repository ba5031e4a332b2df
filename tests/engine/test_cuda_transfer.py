"""Copies to a device and back: which stream everything runs on, pinned memory that runs out, what CUDA reports late."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pymerge import api
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.reader import Reader
from pymerge.engine import transfer
from pymerge.engine.run import run
from pymerge.engine.trace import Tracer
from pymerge.engine.transfer import CudaTransfer, NoTransfer
from pymerge.engine.worker import is_out_of_memory
from pymerge.errors import BackendError, OutOfMemoryError
from pymerge.planner.pieces import Piece
from pymerge.planner.plan import Plan
from tests.helpers.checkpoints import tree, write_config, write_models

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0")
NEEDS_A_DEVICE = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
PIECE = Piece(0, 64, (64, 32))
NAME = "model.layers.0.mlp.up_proj.weight"


class FakeCuda:
    """Streams of a device that is not there: which one is current, and what has been waited for on each."""

    def __init__(self) -> None:
        self.current = "default"
        self.streams: list[str] = []
        self.log: list[tuple[str, str]] = []  # (stream, operation)

    def Stream(self, device: torch.device) -> str:
        self.streams.append(f"stream {len(self.streams)}")
        return self.streams[-1]

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        yield
        self.current = before

    def Event(self) -> FakeCuda:
        return self

    def record(self, stream: str) -> None:
        self.log.append((stream, "wait"))

    def synchronize(self) -> None: ...


class Recorded(TorchDispatchMode):
    """Notes every operation of PyTorch on the stream that is current."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._cuda.log.append((self._cuda.current, func.overloadpacket.__name__))
        return func(*args, **(kwargs or {}))


def ram(folder: Path, device: str = "cpu") -> Plan:
    """The plan of a merge in PyTorch, of one tensor that is merged in one piece."""
    weight = torch.randn(640, 512, generator=torch.Generator().manual_seed(3))
    write_models(folder, {NAME: weight})
    return api.plan(write_config(folder, "ram"), device=device, backend="reference")


def fail_first(patch: pytest.MonkeyPatch, owner: type, function: str, error: Exception) -> list[int]:
    """Let the first call of a function fail; returns the calls that have been made."""
    calls: list[int] = []
    works = getattr(owner, function)

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return works(*arguments)

    patch.setattr(owner, function, failing)
    return calls


def eight_bits(folder: Path, seed: int = 0) -> Tensor:
    """A file of one tensor of 8-bit floats."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)
    save_file({NAME: weight}, folder / "model.safetensors")
    return weight


def test_8_bit_floats_are_upcast_on_the_stream_that_brings_them(tmp_path: Path, monkeypatch: Any) -> None:
    """Elsewhere, their memory would be the next copy's before the other stream has read it."""
    cuda = FakeCuda()
    monkeypatch.setattr(transfer, "_CUDA", cuda)
    monkeypatch.setattr(transfer, "_pinned_bytes", lambda count: torch.empty(count, dtype=torch.uint8))
    weight = eight_bits(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with Tracer() as tracer, Reader(checkpoint.stamps) as reader:
        moves = CudaTransfer(torch.device("cpu"), weight.nbytes, tracer)
        with Recorded(cuda):
            found = moves.load(reader, checkpoint.tensors[NAME], PIECE, None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, weight.to(torch.bfloat16))
    names = [name for _, name in cuda.log]
    copied = names.index("copy_")
    assert {stream for stream, _ in cuda.log[copied:]} == {cuda.streams[0]}
    assert names[copied:] == ["copy_", "_to_copy", "wait"]


@NEEDS_A_DEVICE
def test_8_bit_floats_arrive_whole_while_the_device_is_busy(tmp_path: Path) -> None:
    weights, checkpoints = [], []
    for seed in range(8):
        (tmp_path / str(seed)).mkdir()
        weights.append(eight_bits(tmp_path / str(seed), seed))
        checkpoints.append(open_checkpoint(tmp_path / str(seed)))
    stamps = {file: stamp for checkpoint in checkpoints for file, stamp in checkpoint.stamps.items()}
    with Tracer() as tracer, Reader(stamps) as reader:
        moves = CudaTransfer(DEVICE, weights[0].nbytes, tracer)
        torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]
        loaded = [moves.load(reader, checkpoint.tensors[NAME], PIECE, None) for checkpoint in checkpoints]
        torch.cuda.synchronize()
    for found, weight in zip(loaded, weights, strict=True):
        assert torch.equal(found.cpu(), weight.to(torch.bfloat16))


class AcceleratorError(RuntimeError):
    """Error of CUDA's own, as PyTorch raises it."""


# What is raised where memory runs out: by PyTorch's allocators, CUDA, its libraries, Triton, and csrc/common/check.h.
OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error 2 (cudaErrorMemoryAllocation): out of memory"),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    ValueError("CUDA error: out of memory"),
]


def test_memory_that_runs_out_is_known_in_every_form() -> None:
    assert [is_out_of_memory(error) for error in OUT_OF_MEMORY] == [True] * len(OUT_OF_MEMORY)
    assert [is_out_of_memory(error) for error in OTHERS] == [False] * len(OTHERS)


@pytest.mark.parametrize("error", OUT_OF_MEMORY[3:], ids=lambda error: str(error)[:24])
def test_a_merge_goes_on_where_memory_has_run_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plan = ram(tmp_path)
    run(plan, tmp_path / "whole")
    calls = fail_first(monkeypatch, NoTransfer, "finish", error)
    run(plan, tmp_path / "again")
    assert len(calls) > 1
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")


def test_what_the_device_reports_late_names_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails is told of by whatever waits next: reading, the end of computing, or writing."""
    plan = ram(tmp_path)
    for moment, function, what in (
        ("load", "load", "reading"),
        ("finish", "finish", "mean of active"),
        ("store", "store", "copying the result"),
    ):
        with monkeypatch.context() as patched:
            fail_first(patched, NoTransfer, function, OTHERS[0])
            with pytest.raises(BackendError, match=rf"^{NAME}: {what} failed on cpu \(CUDA error: an illegal"):
                run(plan, tmp_path / moment)
        assert not (tmp_path / moment / "model.safetensors").exists()


def test_a_result_that_cannot_be_copied_for_want_of_memory_ends_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may be computed on with a piece of the output missing."""
    plan = ram(tmp_path)
    with monkeypatch.context() as patched:
        fail_first(patched, NoTransfer, "store", OUT_OF_MEMORY[3])
        with pytest.raises(OutOfMemoryError, match=rf"^{NAME}: no memory on the host for a copy of the result"):
            run(plan, tmp_path / "out")
    run(plan, tmp_path / "out")
    run(plan, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_copies_do_without_pinned_memory_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allocate = torch.empty

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise AcceleratorError("CUDA error: out of memory\nmore")
        return allocate(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    with caplog.at_level(logging.WARNING, "pymerge"):
        assert transfer._pinned_bytes(2**20).nbytes == 2**20
    assert "no 1.00MiB of pinned memory (CUDA error: out of memory): copies to the device will be slower" in caplog.text


@NEEDS_A_DEVICE
def test_a_merge_in_too_little_memory_of_the_device_says_so_or_is_right(tmp_path: Path) -> None:
    plan = ram(tmp_path, device="cuda")
    run(plan, tmp_path / "whole")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    try:
        run(plan, tmp_path / "little")
    except OutOfMemoryError as error:
        assert "runs out of memory on cuda" in str(error)  # noqa: PT017
    else:
        assert tree(tmp_path / "little") == tree(tmp_path / "whole")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
