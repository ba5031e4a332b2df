"""The tokenizer files of a model folder, and the vocabulary that they hold. No code of a model is run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.errors import CheckpointError
from pymerge.tokenizers.templates import TEMPLATE_FILE

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

FAST_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_MAP_FILE, _ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
Files = Mapping[str, bytes]  # name inside the folder -> content
# What a tokenizer is made of when it has no tokenizer.json, and what would contradict a tokenizer.json that is changed.
VOCABULARY_FILES = (
    _ADDED_FILE,
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json")
_OTHER_FILES = (FAST_FILE, CONFIG_FILE, _MAP_FILE, *TEMPLATE_FILES)
_TEMPLATE_FOLDER = "additional_chat_templates"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def is_tokenizer_file(name: Path) -> bool:
    """Whether a carried file (its path inside the model's folder) belongs to the tokenizer."""
    if name.parent.name:
        return name.parts[0] == _TEMPLATE_FOLDER
    return name.name in (*_OTHER_FILES, *VOCABULARY_FILES) or name.suffix == ".tiktoken"


def read_files(folder: Path, names: Iterable[Path]) -> dict[str, bytes]:
    """Files of a folder that belong to its tokenizer: name -> content. CheckpointError if one can't be read."""
    found = {}
    for name in names:
        if is_tokenizer_file(name):
            try:
                found[name.as_posix()] = (folder / name).read_bytes()
            except OSError as error:
                raise CheckpointError(
                    f"{folder / name}: cannot be read ({error.strerror}); check the file and its rights"
                ) from error
    if CONFIG_FILE in found:
        parse_object(folder / CONFIG_FILE, found[CONFIG_FILE])
    for text in (FAST_FILE, TEMPLATE_FILE):
        try:
            found.get(text, b"").decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{folder / text}: is not UTF-8 ({error}); download the file again") from error
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    try:
        return parse_object(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: is no JSON object; download the file again")
    return parsed


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as it is loaded: `ids` of all tokens, in the order of ids, and the added ones among them.

    `files` are those of the folder it comes from; `tokenizer` must not be changed (see `copy_of`).
    """

    folder: Path
    files: Files
    tokenizer: Tokenizer
    ids: Mapping[str, int]
    added: Mapping[int, AddedToken]

    @property
    def limit(self) -> int:
        """Number of the last token, plus one."""
        return max(self.ids.values(), default=-1) + 1


def read_vocabulary(folder: Path, files: Files) -> Vocabulary:
    """The vocabulary of `files` (from `read_files`), with the tokens that transformers adds when it loads them.

    Raises CheckpointError: the library is missing, there is no tokenizer.json, or it cannot be loaded.
    """
    if FAST_FILE not in files:
        slow = [name for name in files if name in VOCABULARY_FILES or name.endswith(".tiktoken")]
        if slow:
            raise CheckpointError(
                f"{folder}: its tokenizer is stored as {', '.join(slow)} alone; write its {FAST_FILE} "
                "(AutoTokenizer.from_pretrained, then save_pretrained)"
            )
        remedy = "put the model's tokenizer files there"
        if folder.is_file():  # weights alone
            remedy = "put it into a folder with the model's tokenizer files and config.json, and give the folder"
        raise CheckpointError(f"{folder}: has no {FAST_FILE}; {remedy}")
    tokenizer = load(folder / FAST_FILE, files[FAST_FILE].decode())
    for token, expected in _named_elsewhere(folder, files):
        known = tokenizer.token_to_id(token.content)
        if known is None:
            add(tokenizer, token)
            known = tokenizer.token_to_id(token.content)
        if expected is not None and known != expected:
            raise CheckpointError(
                f"{folder}: gives token {token.content!r} the id {expected}, by {FAST_FILE} it is {known}; "
                "load the tokenizer with transformers and save it again"
            )
    return vocabulary_of(folder, files, tokenizer)


def read_vocabularies(folders: Mapping[Path, Files]) -> dict[Path, Vocabulary | CheckpointError]:
    """`read_vocabulary` of several folders, or what is wrong there; equal files are read once."""
    known: dict[tuple[bytes | None, ...], Vocabulary] = {}
    found: dict[Path, Vocabulary | CheckpointError] = {}
    for folder, files in folders.items():
        key = tuple(files.get(name) for name in (FAST_FILE, CONFIG_FILE, _MAP_FILE, _ADDED_FILE))
        try:
            known[key] = (
                replace(known[key], folder=folder, files=files) if key in known else read_vocabulary(folder, files)
            )
            found[folder] = known[key]
        except CheckpointError as error:
            found[folder] = error
    return found


def load(path: Path, text: str) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json; `path` stands for it in messages. Raises CheckpointError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{path}: to read it, the library tokenizers is needed; pip install 'pymerge-engine[tokenizers]'"
        ) from error
    with _Explained(path):
        return Tokenizer.from_str(text)


class _Explained:
    """Turns what the tokenizers library raises, plain exceptions of no class of their own, into CheckpointError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is Exception:
            raise CheckpointError(
                f"{self._path}: cannot be loaded by the tokenizers library ({error}); download the file again"
            ) from error


def copy_of(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer once more, to be changed."""
    return load(vocabulary.folder / FAST_FILE, vocabulary.tokenizer.to_str())


def vocabulary_of(folder: Path, files: Files, tokenizer: Tokenizer) -> Vocabulary:
    """A tokenizer with its ids looked up."""
    ids = dict(sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: (item[1], item[0])))
    return Vocabulary(folder, files, tokenizer, ids, dict(sorted(tokenizer.get_added_tokens_decoder().items())))


def add(tokenizer: Tokenizer, token: AddedToken) -> None:
    """Add one token, keeping what it says about itself."""
    (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _named_elsewhere(folder: Path, files: Files) -> Iterator[tuple[AddedToken, int | None]]:
    """Tokens, with their ids where they are given, that files beside tokenizer.json name: transformers adds what lacks.

    Where tokenizer_config.json does not list added tokens, special_tokens_map.json and added_tokens.json count too.
    """
    from tokenizers import AddedToken

    config, mapped, numbers = (
        parse_object(folder / name, files.get(name, b"{}")) for name in (CONFIG_FILE, _MAP_FILE, _ADDED_FILE)
    )
    try:
        if "added_tokens_decoder" not in config:
            config |= mapped
        listed = [each for key in _LISTED for each in config.get(key) or []]
        special = [_content(value) for value in (*(config.get(key) for key in _NAMED), *listed)]
        if "added_tokens_decoder" not in config:
            for token, number in sorted(numbers.items(), key=lambda item: int(item[1])):
                yield AddedToken(token, special=token in special, normalized=token not in special), int(number)
        decoder = {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
        for number in sorted(decoder):
            flags = {flag: bool(decoder[number].get(flag, False)) for flag in _FLAGS}
            yield AddedToken(decoder[number]["content"], **flags), number
        for content in special:
            if content:
                yield AddedToken(content, special=True, normalized=False), None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: it or a file beside it names tokens in a way that is not understood "
            f"({type(error).__name__}: {error}); load the tokenizer with transformers and save it again"
        ) from error


def _content(value: Any) -> str | None:
    """The text of a token, which may be a mapping of its flags."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
