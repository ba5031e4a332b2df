"""Folders of texts or images, read as the inputs of a model by its own tokenizer or image processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymerge.errors import ArgumentError, CheckpointError
from pymerge.planner.data import data_files

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Texts (each with a target, where a model has a decoder of its own) or paths of images, in their order, and a
    hash of what they hold."""

    folder: Path
    texts: tuple[tuple[str, str | None], ...]
    images: tuple[Path, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.texts) + len(self.images)


def read_samples(folder: Path, most: int) -> Samples:
    """The first samples of a folder, at most so many: files by their paths, lines of a .jsonl file in their order.

    A .txt file is one text; a line of a .jsonl file is a text, or an object with "text" and maybe "target". Other files
    are passed over. Raises CheckpointError where there is none, where texts and images lie together, or where a file
    cannot be read or holds nothing.
    """
    texts, images = data_files(folder)
    digest = hashlib.sha256()
    if images:
        for path in images[:most]:
            digest.update(hashlib.sha256(_bytes(path)).digest())
        return Samples(folder, (), tuple(images[:most]), digest.hexdigest())
    found = tuple(islice(chain.from_iterable(map(_texts, texts)), most))
    digest.update(json.dumps(found).encode())
    return Samples(folder, found, (), digest.hexdigest())


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file") from error


def _decoded(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 ({error}); convert it") from error


def _texts(path: Path) -> Iterator[tuple[str, str | None]]:
    whole = _decoded(path)
    if path.suffix.lower() == ".txt" and whole:
        yield whole, None
        return
    if not whole.strip():
        raise CheckpointError(f"{path}: is empty; write a text into it, or remove it")
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}:{number}: is not JSON ({error}); correct the line") from error
        found = value if isinstance(value, dict) else {"text": value}
        text, target = found.get("text"), found.get("target")
        if not isinstance(text, str) or not (target is None or isinstance(target, str)):
            raise CheckpointError(
                f'{path}:{number}: has no text; write a string, or an object {{"text": "..."}}, on each line'
            )
        yield text, target


def batches(samples: Samples, model: Any, folder: Path, length: int, size: int, tokens: int | None) -> list[Batch]:
    """Inputs of a model, by its arguments' names: at most `size` samples of one shape each, so that nothing is padded.

    Args:
        folder: of the model, which has the tokenizer or image processor.
        length: tokens of a text at most; what comes behind them is cut off.
        tokens: stop before the first sample with which there would be more tokens (of images, patches are not known:
            `tokens` is for texts); the first sample counts always. None: all.
    """
    if samples.images and tokens is not None:
        raise ArgumentError("--max-tokens is for texts, and the data are images; give --samples")
    found = _of_images(samples, folder) if samples.images else _of_texts(samples, model, folder, length)
    taken: list[Batch] = []
    count = 0
    for inputs in found:
        count += sum(tensor.numel() for tensor in inputs.values())
        if tokens is not None and taken and count > tokens:
            break
        taken.append(inputs)
    if not taken:
        raise CheckpointError(
            f"{samples.folder}: the tokenizer of {folder} makes no token of any text; give texts of other characters "
            "than blanks, or repair the tokenizer"
        )
    shapes: dict[Any, list[Batch]] = {}
    for inputs in taken:
        shapes.setdefault(tuple((name, tuple(each.shape)) for name, each in inputs.items()), []).append(inputs)
    return [
        {name: torch.stack([each[name] for each in alike[start : start + size]]) for name in alike[0]}
        for alike in shapes.values()
        for start in range(0, len(alike), size)
    ]


def _of_texts(samples: Samples, model: Any, folder: Path, length: int) -> Iterator[Batch]:
    tokenizer = _own("AutoTokenizer", folder, "tokenizer (tokenizer.json)")
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        length = limit
    for number, (text, target) in enumerate(samples.texts):
        inputs = {"input_ids": _ids(tokenizer, text, length)}
        if both:
            if target is None:
                raise CheckpointError(
                    f"{samples.folder}: text {number + 1} has no target, and {type(model).__name__} has a decoder that "
                    'reads one; give .jsonl files with {"text": "...", "target": "..."} on each line'
                )
            inputs["labels"] = _ids(tokenizer, target, length)
        if all(len(ids) for ids in inputs.values()):
            yield inputs


def _ids(tokenizer: Any, text: str, length: int) -> Tensor:
    ids: Mapping[str, Any] = tokenizer(text, truncation=True, max_length=length)
    return torch.tensor(ids["input_ids"], dtype=torch.int64)


def _of_images(samples: Samples, folder: Path) -> Iterator[Batch]:
    from PIL import Image

    processor = _own("AutoImageProcessor", folder, "image processor (preprocessor_config.json)")
    for path in samples.images:
        try:
            with Image.open(path) as image:
                pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        except OSError as error:
            raise CheckpointError(f"{path}: is no image that can be read ({error}); repair or remove it") from error
        yield {"pixel_values": pixels[0]}


def _own(loader: str, folder: Path, what: str) -> Any:
    """The tokenizer or image processor of a model's folder."""
    import transformers

    try:
        return getattr(transformers, loader).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder}: transformers loads no {what} from it ({reason}); copy that of its base into the folder"
        ) from error
