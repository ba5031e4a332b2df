"""Steps carried out in memory, one tensor at a time: inputs from memory or files, results into memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.finite import is_finite, overflow
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import Array
from pymerge.common.blas import one_blas_thread
from pymerge.common.devices import resolve_device
from pymerge.common.dtypes import code_of, torch_dtype, upcast
from pymerge.common.progress import NoProgress
from pymerge.engine.core_solver import CoreSolver
from pymerge.engine.trace import Tracer
from pymerge.engine.whole import Share, merge_whole, reduce_together
from pymerge.engine.worker import Context, check_input, first_line, is_out_of_memory
from pymerge.errors import ArgumentError, BackendError, OutOfMemoryError
from pymerge.methods.actions import Action, InCore
from pymerge.methods.reduce import Reduce
from pymerge.methods.rows import Rows
from pymerge.ops._op import one_thread
from pymerge.planner.steps import Step


class Evaluator:
    """Carries out steps where their tensors are, or on one device.

    Args:
        reader: reads what is not in memory.
        device: of all computations; None: of each step, where its base is.
        allow_nonfinite: do not look for NaN and infinity.
    """

    def __init__(self, reader: Reader, device: str | torch.device | None, backend: str, allow_nonfinite: bool) -> None:
        self._reader = reader
        self._device = None if device is None else torch.device(str(resolve_device(device)))
        self._backend = backend
        self._allow_nonfinite = allow_nonfinite
        self._runners: dict[str, Runner] = {}
        self._finite: set[tuple[str, int]] = set()  # weights whose inputs have been looked at

    def device_of(self, step: Step) -> torch.device:
        """Device that a step is computed on."""
        if self._device is not None:
            return self._device
        held = (entry.tensor.device for entry in (step.base, *step.experts) if isinstance(entry, HeldEntry))
        return next(held, torch.device("cpu"))

    def merge(self, step: Step, out: Tensor, share: Share | None = None) -> None:
        """Write the merged tensor to `out`, of the step's shape, in its dtype, on any device.

        Raises:
            NonFiniteError: an input holds NaN or infinity, or the result overflows.
            ArgumentError, BackendError, OutOfMemoryError: the method refuses these values, or cannot run.
        """
        try:
            made = self._merged(step, out, share)
        except ArgumentError as error:
            raise ArgumentError(f"{step.name}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            self._refuse(step, error)
        if not (self._allow_nonfinite or step.infinite or is_finite(made)):
            self._blame(step)
        if made.data_ptr() != out.data_ptr() or made.device != out.device:
            out.copy_(made)
        elif out.ndim:  # native code wrote to it, of which autograd knows nothing
            out.narrow(0, 0, 0).zero_()

    def reduced(self, steps: Sequence[Step]) -> dict[int, Share]:
        """Shares of steps, by their ids, that are merged by what several together tell."""
        groups: dict[Action, list[Step]] = {}
        for step in sorted(steps, key=lambda step: step.name):
            if isinstance(step.action, Reduce) and step.action.scope == "model" and 0 not in step.shape:
                groups.setdefault(step.action, []).append(step)
        found: dict[int, Share] = {}
        for action, group in groups.items():
            assert isinstance(action, Reduce)
            sizes = [step.base.numel for step in group]
            shares = reduce_together(
                action.on(*(entry.dtype for step in group for entry in step.inputs)),
                self._runner(self.device_of(group[0])),
                sizes,
                len(group[0].experts),
                [partial(self._checked_rows, step) for step in group],
            )
            found |= {id(step): share for step, share in zip(group, shares, strict=True)}
        return found

    def _merged(self, step: Step, out: Tensor, share: Share | None) -> Tensor:
        if isinstance(step.action, InCore):
            return self._core(step, out)
        rows = self._checked_rows(step, out)
        return merge_whole(step.action, step.role, self._runner(self.device_of(step)), rows, share)

    def _core(self, step: Step, out: Tensor) -> Tensor:
        """A weight that is solved by its factors, range of rows by range of rows, as files are."""
        context = Context(
            self._runner(torch.device("cpu")), self._reader, Tracer(None), NoProgress(), self._allow_nonfinite, True
        )
        solver = CoreSolver(context)
        base = self.load(step.base, torch.device("cpu"))
        made = torch.empty(step.shape, dtype=torch_dtype(step.dtype))
        with one_thread(), one_blas_thread():
            for piece in step.pieces:
                rows = slice(piece.start, piece.stop)
                solver.merge(step, piece.start, Array.of(base[rows].contiguous()), Array.of(made[rows]))
        return made

    def _checked_rows(self, step: Step, out: Tensor | None = None) -> Rows:
        """All rows of a step on its device; of inputs that no result may show, looked at once."""
        device = self.device_of(step)
        inputs = [self.load(entry, device) for entry in step.inputs]
        place = (step.name, step.offset)
        looked_at = self._allow_nonfinite or place in self._finite
        if not looked_at and (isinstance(step.action, Reduce) or not step.action.shows_nonfinite):
            for entry, tensor in zip(step.inputs, inputs, strict=True):
                check_input(self._reader, entry, 0, tensor)
            self._finite.add(place)
        base, experts = (inputs[0], inputs[1:]) if step.reads_base else (inputs[0], inputs)
        return Rows(base, experts, step.dtype, out=None if out is None else _room(step, out, inputs))

    def load(self, entry: TensorEntry, device: torch.device) -> Tensor:
        """A tensor on a device: in the memory of who holds it, if it is there."""
        tensor = entry.tensor if isinstance(entry, HeldEntry) else self._reader.read(entry)
        return upcast(tensor).to(device)

    def _runner(self, device: torch.device) -> Runner:
        name = str(device)
        if name not in self._runners:
            self._runners[name] = Runner(self._backend, name)
        return self._runners[name]

    def _blame(self, step: Step) -> NoReturn:
        """Raise NonFiniteError about an input that is not finite, or else about the result."""
        for entry in step.inputs:
            check_input(self._reader, entry, 0, self.load(entry, torch.device("cpu")))
        raise overflow(step.name, step.dtype)

    def _refuse(self, step: Step, error: BaseException) -> NoReturn:
        where = self.device_of(step)
        if is_out_of_memory(error):
            remedy = "pass device='cpu'" if where.type == "cuda" else "free memory, or use a machine with more"
            raise OutOfMemoryError(
                f"{step.name}: {step.action.label} on {list(step.shape)} runs out of memory on {where} "
                f"({first_line(error)}); {remedy}"
            ) from error
        raise BackendError(
            f"{step.name}: {step.action.label} failed on {where} ({first_line(error)}); try backend='reference', and "
            "report this"
        ) from error


def _room(step: Step, out: Tensor, inputs: Sequence[Tensor]) -> Tensor | None:
    """`out`, if a result can be written to it at once: contiguous, of the right kind, and no input is in its memory."""
    if not out.is_contiguous() or code_of(out.dtype) != step.dtype or out.numel() == 0:
        return None
    if any(out.device != tensor.device for tensor in inputs):
        return None
    storage = out.untyped_storage().data_ptr()
    return None if any(tensor.untyped_storage().data_ptr() == storage for tensor in inputs) else out
