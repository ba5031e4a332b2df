"""Build a RoutedModel in memory, from a base model and the state dicts of its experts."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pymerge.engine.state_dicts import check_plain
from pymerge.errors import ArgumentError
from pymerge.ops._op import compute_dtype, task_vector
from pymerge.ops.combine import Combine
from pymerge.ops.routed.task_storage import Tasks
from pymerge.wemoe.convolution import is_convolution
from pymerge.wemoe.model import RoutedModel
from pymerge.wemoe.modules import is_linear, is_transposed, runner
from pymerge.wemoe.router import make_routers
from pymerge.wemoe.spec import ModuleSpec, RouterSpec, Spec, StorageSpec
from pymerge.wemoe.task_vectors import compress

# Last part of the name of what the field calls the MLP of a block.
_MLP = re.compile(r"(^|_)(mlp|ffn|ff|feed_?forward|dense_?relu_?dense)$", re.IGNORECASE)


def upscale(
    base: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
    *,
    static: Mapping[str, Tensor] | None = None,
    modules: str | None = None,
    storage: StorageSpec | None = None,
    router: RouterSpec | None = None,
    init_lambda: float = 0.3,
    reduce: str = "sample",
    seed: int = 0,
) -> RoutedModel:
    """A RoutedModel of a copy of `base`; the base itself is left as it is.

    Args:
        base: any module; what is routed of it is made of nn.Linear or Conv1D layers and convolutions.
        experts: state dicts of the same architecture, by name or in order.
        static: what parameters that are not routed become, by name; default W_0 + init_lambda sum_t tau_t.
        modules: regular expression that matches the whole path of each module to route (an MLP, attention, a
            convolutional stem, a whole block); default: MLPs, by the field's usual names. An MLP that is split into
            `intermediate` and `output`, as BERT's, goes by the first.
        storage: how task vectors are kept; default dense bfloat16.
        router: default depth 2, one for each module.
        init_lambda: gates at the start.
        reduce: "sample" or "batch", see RoutedModel.
        seed: of the routers' initial weights.

    Raises ArgumentError if an expert does not fit the base, or nothing matches. Source: WEMoE, arXiv 2402.00433.
    """
    if not isinstance(experts, Mapping):
        experts = {f"expert-{number}": expert for number, expert in enumerate(experts)}
    if not experts:
        raise ArgumentError("upscale: no experts were given; pass at least one")
    state = base.state_dict()
    check_plain("upscale: the base", state)
    for name, expert in experts.items():
        check_plain(f"upscale: expert {name!r}", expert)
        check_expert(name, expert, state)
    found = list(find_modules(base, modules))
    spec = Spec.model_validate(
        {
            "architecture": type(base).__name__,
            "experts": list(experts),
            "init_lambda": float(init_lambda),
            "reduce": reduce,
            "router": router or RouterSpec(),
            "storage": storage or StorageSpec(),
            "modules": found,
        }
    )
    parameters = {name for module in found for name in module.parameters}
    model = copy.deepcopy(base)
    _merge_rest(model, state, experts, static, parameters, init_lambda)
    vectors: dict[str, Tasks | Tensor] = {}
    for name in sorted(parameters):
        dtype = compute_dtype(state[name])
        taus = [
            task_vector(state[name], expert[name].to(state[name].device), None, dtype) for expert in experts.values()
        ]
        vectors[name] = compress(taus, spec.storage)
    routed = RoutedModel(model, spec, {name: name for name in parameters}, vectors, make_routers(spec, seed))
    return routed.to(next(iter(state.values())).device)


def check_expert(label: str, expert: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError unless an expert has every floating tensor of the base, in its shape."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if name not in expert:
            raise ArgumentError(f"upscale: expert {label!r} has no {name!r}; give experts fine-tuned from this base")
        if expert[name].shape != tensor.shape:
            raise ArgumentError(
                f"upscale: {name!r} of expert {label!r} has shape {tuple(expert[name].shape)}, the base's is "
                f"{tuple(tensor.shape)}; give experts fine-tuned from this base"
            )


def find_modules(model: nn.Module, pattern: str | None) -> Iterator[ModuleSpec]:
    """The modules of a model to route, in its own order; see `upscale`. Raises ArgumentError if there is none."""
    count, inside = 0, None
    for path, module in model.named_modules():
        # The model itself has no path, by which its router could go.
        if not path or (inside is not None and path.startswith(inside)):
            continue
        last = path.rpartition(".")[2]
        if pattern is None:
            matches = bool(_MLP.search(last)) or (last == "intermediate" and bool(_output_of(model, path)))
        else:
            matches = re.fullmatch(pattern, path) is not None
        if not matches:
            continue
        layers: dict[str, nn.Module] = {
            f"{path}.{name}".strip("."): layer
            for name, layer in module.named_modules()
            if is_linear(layer) or is_convolution(layer)
        }
        if last == "intermediate":
            layers |= _output_of(model, path)
        if not layers and pattern is None:
            continue
        count, inside = count + 1, f"{path}."
        yield _module_spec(path, module, layers)
    if not count:
        what = "MLP by the usual names" if pattern is None else f"module that {pattern!r} matches as a whole"
        raise ArgumentError(f"upscale: {type(model).__name__} has no {what}; give modules='REGEX' of module paths")


def _output_of(model: nn.Module, path: str) -> dict[str, nn.Linear]:
    """The second layer of an MLP split as BERT's: `output.dense` beside `intermediate`."""
    name = f"{path.rpartition('.')[0]}.output.dense".strip(".")
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return {}
    return {name: layer} if is_linear(layer) else {}


def _module_spec(path: str, module: nn.Module, layers: Mapping[str, nn.Module]) -> ModuleSpec:
    own = {f"{path}.{name}" for name, parameter in module.named_parameters() if parameter.ndim > 1}
    odd = sorted(own - {f"{name}.weight" for name in layers})
    if odd or not layers:
        raise ArgumentError(
            f"upscale: {path!r} holds {odd[0] if odd else 'no such layer'}, and only linear layers and convolutions "
            "can be routed; give modules='REGEX' of modules made of nn.Linear, Conv1D, nn.Conv1d, 2d or 3d"
        )
    weights: dict[str, list[int]] = {}
    for name, layer in layers.items():
        weights |= {f"{name}.{kind}": list(parameter.shape) for kind, parameter in layer.named_parameters()}
    return ModuleSpec(path=path, hidden_size=_width(next(iter(layers.values()))), parameters=weights)


def _width(first: nn.Module) -> int:
    """d of what a router sees: the input of a linear layer, the output of a convolution."""
    if is_convolution(first):
        return first.out_channels
    assert is_linear(first)
    return int(first.weight.shape[0 if is_transposed(first) else 1])


@torch.no_grad()
def _merge_rest(
    model: nn.Module,
    state: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    static: Mapping[str, Tensor] | None,
    parameters: set[str],
    init_lambda: float,
) -> None:
    """Set everything that is not routed, in place; `state` is the base's (tied tensors of `model` share memory)."""
    for name, tensor in model.state_dict().items():
        if name in parameters or not tensor.is_floating_point():
            continue
        if static is None:
            run = runner("auto", tensor.device)
            tuned = [expert[name].to(tensor.device) for expert in experts.values()]
            tensor.copy_(run(Combine(state[name], tuned, [init_lambda] * len(tuned))))
        elif name in static:
            tensor.copy_(static[name])
        else:
            raise ArgumentError(f"upscale: static has no {name!r}; give every tensor that is not routed")
