"""Parameters that one version of a library calls otherwise than the next, in modules of the same name. Pure."""

from __future__ import annotations

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

# A norm's parameters as TensorFlow calls them, and weight norm's as PyTorch calls them now, each with the usual words.
_NORM = {"gamma": "weight", "beta": "bias"}
_WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
# Modules that torch.compile, FSDP and checkpointed activations put around others.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def usual(shapes: Shapes) -> dict[str, str]:
    """The usual name for each of a model's names, most of which have it already.

    A gamma alone may be the scale of a layer: it is a norm's weight beside its beta, or in a module that is called a
    norm.
    """
    bare = {unwrapped(name): shape for name, shape in shapes.items()}
    if len(bare) < len(shapes):
        return {name: name for name in shapes}  # with and without a wrapper: two models in one
    found = {}
    for name in shapes:
        plain = unwrapped(name)
        new = _usual(plain, bare)
        found[name] = plain if new in bare else new
    return found


def unwrapped(name: str) -> str:
    """The name without the modules that tools put around others."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def spelling(name: str, other: str) -> str:
    """The last words of a name that differ from those of another one of the same module, for people."""
    words, others = name.split("."), other.split(".")
    same = next((i for i, (one, two) in enumerate(zip(words, others, strict=False)) if one != two), len(words))
    return ".".join(words[same:])


def _usual(name: str, shapes: Shapes) -> str:
    for old, new in _WEIGHT_NORM.items():
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    stem, _, last = name.rpartition(".")
    if last not in _NORM:
        return name
    partner = f"{stem}.{'beta' if last == 'gamma' else 'gamma'}"
    norm = "norm" in stem.rpartition(".")[2].lower() or shapes.get(partner) == shapes[name]
    return f"{stem}.{_NORM[last]}" if norm else name
