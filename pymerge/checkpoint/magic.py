"""Files whose first bytes are those of something else than their names say."""

from __future__ import annotations

from pathlib import Path

from pymerge.errors import CheckpointError

_AGAIN = "download it again, logged in if the model is gated (hf auth login)"
# First bytes, what a file with them is, and what to do.
_KINDS = (
    (b"version ", "a Git LFS pointer, not the weights", "run `git lfs pull` there"),
    (b"<", "a web page, not the weights", _AGAIN),
    (b'{"', "JSON text, not weights", _AGAIN),
    (b"GGUF", "a GGUF file", "give it the suffix .gguf"),
    (b"PK\x03\x04", "a file of torch.save", "give it the suffix .bin"),
    (b"\x80\x02", "a pickle, of PyTorch before 1.6", "save it again: torch.save(torch.load(FILE), FILE)"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it"),
    (b"\x89HDF", "a file of HDF5, as Keras and TensorFlow write", "convert it with transformers 4 (from_tf=True)"),
)


def refuse_foreign(path: Path, start: bytes) -> None:
    """Raise CheckpointError if a file that cannot be read as what its name says begins as something else does.

    Only then: the length of a header, with which a safetensors file begins, may be any of these bytes.
    """
    for magic, what, remedy in _KINDS:
        if start.startswith(magic):
            raise CheckpointError(f"{path}: is {what}; {remedy}")
    if start[8:10] == b'{"':
        raise CheckpointError(f"{path}: is a safetensors file; give it the suffix .safetensors")
