"""Names of tensors in files of adapters: which module each belongs to, and what it is of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pymerge.adapters.factors import Matrix, matrix
from pymerge.adapters.settings import merged_by_peft
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import is_float
from pymerge.common.names import first_few, shorten
from pymerge.errors import CheckpointError

_PREFIXES = ("base_model.model.base_model.model.", "base_model.model.", "base_model.")
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# What files of other methods have in their names; MonteCLoRA's sampler has no part in its weights.
_OTHERS = (
    "lora_", "hada_", "lokr_", "vera_", "oft_", "boft_", "ia3_", "hra_", "randlora_", "fourierft_", "delora_", "hira_",
    "miss_", "c3a_", "shira_", "waveft_", "road_", "ln_tuning_", "vblora_", "gralora_", "ranknum", "prompt_embeddings",
    "prompt_encoder",
)  # fmt: skip
_IGNORED = ("original_module", "lora_monteclora_sampler", "_extra_state")
_GATHER = (
    "save it again, after training with ZeRO-3 or FSDP with the shards gathered (deepspeed.zero.GatheredParameters, or "
    "FSDP's summon_full_params, around save_pretrained)"
)


@dataclass
class Module:
    """Tensors of an adapted module, or of a parameter of one: `depth` says how many others are around it."""

    name: str
    depth: int = 0
    outer: str = ""  # the module of which the file counts it as a part twice: nn.MultiheadAttention
    fields: dict[str, TensorEntry] = field(default_factory=dict)  # by the names of _FACTORS, and "bias"
    scale: float | None = None  # where the file says it of this module alone
    turned: bool = False  # both factors are stored transposed: inputs x rank and rank x outputs

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.fields

    @property
    def a(self) -> TensorEntry:
        return self.fields["lora_embedding_A" if self.embedding else "lora_A"]

    @property
    def b(self) -> TensorEntry:
        return self.fields["lora_embedding_B" if self.embedding else "lora_B"]

    @property
    def right(self) -> Matrix:
        """A, rank x inputs."""
        return matrix(self.a, self.turned)

    @property
    def left(self) -> Matrix:
        """B, outputs x rank."""
        return matrix(self.b, self.turned)


@dataclass
class Keys:
    """All tensors of an adapter, by what they are. `values` are whole tensors in place of the base's, by name."""

    modules: dict[tuple[str, int], Module] = field(default_factory=dict)
    values: dict[str, TensorEntry] = field(default_factory=dict)
    tokens: dict[str, TensorEntry] = field(default_factory=dict)  # rows of tables, by module
    saved: list[tuple[str, list[str], _Key]] = field(default_factory=list)  # below modules_to_save


def read_keys(tensors: Mapping[str, TensorEntry]) -> Keys:
    """Sort the tensors of an adapter. Raises CheckpointError for what is of no LoRA, incomplete, or there twice."""
    keys, adapters = Keys(), dict[str, str]()
    for key, entry in tensors.items():
        _Key(key, entry, keys, adapters).take()
    for around, rest, saved in keys.saved:
        saved.take_saved(around, rest)
    for module in keys.modules.values():
        check_pair(module, _GATHER)
    return keys


class _Key:
    """One name, read word by word."""

    def __init__(self, key: str, entry: TensorEntry, keys: Keys, adapters: dict[str, str]) -> None:
        self._key, self._entry, self._keys, self._adapters = key, entry, keys, adapters

    def take(self) -> None:
        stem = next((prefix for prefix in _PREFIXES if self._key.startswith(prefix)), "")
        words = self._key[len(stem) :].split(".")
        module: list[str] = []
        depth, outer = 0, ""
        for at, word in enumerate(words):
            rest = words[at + 1 :]
            if word in _IGNORED or (word == "token_adapter" and rest[:1] == ["trainable_tokens_original"]):
                return
            if word == "base_layer":
                depth += 1
            elif word in _FACTORS:
                self._factor(".".join(module), depth, outer, word, rest)
                return
            elif word == "token_adapter" and rest[:1] == ["base_layer"]:
                continue  # the table below, resized
            elif word == "token_adapter":
                if rest[:1] != ["trainable_tokens_delta"]:
                    raise self._unknown()
                self._name_of(rest[1:], ())
                self._put(self._keys.tokens, ".".join(module))
                return
            elif word == "modules_to_save":
                self._keys.saved.append((".".join(module), rest, self))
                return
            elif word.startswith(_OTHERS):
                raise CheckpointError(
                    f"{self._entry.file}: tensor {shorten(self._key)} is of no plain LoRA; "
                    f"{merged_by_peft(self._entry.file.parent)}"
                )
            else:
                if depth and rest:
                    outer, depth = ".".join(module), 0
                module.append(word)
        self._put(self._keys.values, ".".join(module))

    def take_saved(self, module: str, rest: list[str]) -> None:
        """A tensor of a module that was trained whole: in raw dumps behind the name of an adapter, which PEFT takes
        away when it saves. With bias: all it saves the bias a second time, which it then leaves unread."""
        if not {".".join([module, *rest]), ".".join([module, *rest[1:]])} & self._keys.values.keys():
            self._name_of(rest[:-1][:1], ())
            self._put(self._keys.values, ".".join([module, *(rest[1:] if len(rest) > 1 else rest)]))

    def _factor(self, module: str, depth: int, outer: str, word: str, rest: list[str]) -> None:
        parameter = self._name_of(rest, ("weight", "bias"))
        fits = parameter in ("weight", "") or (parameter == "bias" and word == "lora_B")
        if not module or not fits:
            raise self._unknown()
        found = self._keys.modules.setdefault((module, depth), Module(module, depth, outer))
        what = "bias" if parameter == "bias" else word
        add_field(found, what, self._entry)

    def _name_of(self, rest: list[str], parameters: tuple[str, ...]) -> str:
        """The parameter that follows a word, behind the name of an adapter if there is one."""
        parameter = rest[-1] if rest and rest[-1] in parameters else ""
        names = rest[:-1] if parameter else rest
        if len(names) > 1:
            raise self._unknown()
        if names:
            self._adapters.setdefault(names[0], self._key)
        if len(self._adapters) > 1:
            raise CheckpointError(
                f"{self._entry.file}: holds several adapters ({first_few(self._adapters)}); save each of them with "
                "save_pretrained in a folder of its own"
            )
        return parameter

    def _put(self, found: dict[str, TensorEntry], name: str) -> None:
        if name in found:
            raise CheckpointError(
                f"{self._entry.file}: tensors {shorten(found[name].name)} and {shorten(self._key)} are both {name}; "
                "keep one of them"
            )
        if not name:
            raise self._unknown()
        found[name] = self._entry

    def _unknown(self) -> CheckpointError:
        return CheckpointError(
            f"{self._entry.file}: tensor {shorten(self._key)} has no name that PEFT gives; "
            f"{merged_by_peft(self._entry.file.parent)}"
        )


def check_pair(module: Module, remedy: str, words: tuple[str, str] = ("A", "B")) -> None:
    """Raise CheckpointError unless a module has both factors, whole, with axes. Files call them lora_ and a word."""
    first = next(iter(module.fields.values()))
    pair = ("lora_embedding_A", "lora_embedding_B") if module.embedding else ("lora_A", "lora_B")
    if module.embedding and {"lora_A", "lora_B"} & module.fields.keys():
        raise CheckpointError(
            f"{first.file}: {module.name} has factors of a linear layer and of an embedding; save it again"
        )
    lacking = [field for field in pair if field not in module.fields]
    if lacking:
        there = first_few(entry.name for entry in module.fields.values())
        other = lacking[0][:-1] + words[pair.index(lacking[0])]
        raise CheckpointError(f"{first.file}: has {there}, but no {other} of {module.name}; {remedy}")
    for entry in (module.a, module.b):
        if len(entry.shape) < 2 or 0 in entry.shape:
            raise CheckpointError(
                f"{entry.file}: tensor {shorten(entry.name)} has shape {list(entry.shape)}, which no factor has; "
                f"{remedy}"
            )


def add_field(module: Module, what: str, entry: TensorEntry) -> None:
    """Give a module one more tensor. Raises CheckpointError if it has it already, or it is not of floats."""
    if what in module.fields:
        raise CheckpointError(
            f"{entry.file}: tensors {shorten(module.fields[what].name)} and {shorten(entry.name)} are the same "
            "factor; keep one of them"
        )
    if not is_float(entry.dtype):
        raise CheckpointError(
            f"{entry.file}: tensor {shorten(entry.name)} has dtype {entry.dtype}, which no factor has; "
            "save the adapter again in bfloat16 or float32"
        )
    module.fields[what] = entry


def modules_of(names: Iterable[str]) -> Iterator[str]:
    """Paths of all modules that tensors of these names lie in."""
    for name in names:
        at = name.rfind(".")
        while at > 0:
            yield name[:at]
            at = name.rfind(".", 0, at)
