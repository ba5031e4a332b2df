"""`task_dots` in one pass over the inputs; columns are turned into rows first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymerge.backends.triton._arguments import on
from pymerge.common.arrays import as_tensor
from pymerge.common.shapes import vector_shape
from pymerge.ops.task_dots import TaskDots

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def compute(op: TaskDots, threads: int) -> NDArray[Any]:
    """The inner products.

    The tensors share one dtype in the kernel; where they don't, they are upcast to float32.
    """
    import torch

    from pymerge.kernels import task_dots as kernel

    tensors = [as_tensor(tensor) for tensor in op.tensors]
    shape = vector_shape(tensors[0].shape, op.axis)
    common = tensors[0].dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32

    def vectors(tensor: Tensor) -> Tensor:
        matrix = tensor.reshape(shape)
        return (matrix.T if op.axis == "columns" else matrix).contiguous()

    with on(tensors[0].device):
        origin = None if op.base is None else vectors(as_tensor(op.base))
        dots: NDArray[Any] = kernel.launch(origin, [vectors(tensor.to(common)) for tensor in tensors]).cpu().numpy()
    return dots
