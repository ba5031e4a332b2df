"""Models of the Hugging Face Hub: from its cache on this machine, downloaded into it where they are not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pymerge.checkpoint.model_files import SKIPPED_FOLDERS, WEIGHT_SUFFIXES
from pymerge.checkpoint.weight_files import FORMATS, WeightFormat, find_weights, read_weight_map
from pymerge.errors import CheckpointError

_NOT_WEIGHTS = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES] + [f"{folder}/*" for folder in SKIPPED_FOLDERS]


def fetch(repository: str, revision: str | None) -> Path:
    """Folder of a model in the cache of huggingface_hub; its name is the commit.

    A cached revision with all its weights is used as it is, without asking the Hub whether there is a newer one.
    Otherwise what a merge needs is downloaded, with a progress bar: weights in one format, safetensors if there are
    any, and the files that an output takes over. No code of a model is run. Raises CheckpointError when that is
    not possible: huggingface_hub missing, offline, no such model or revision, no access.
    """
    wanted = repository if revision is None else f"{repository}@{revision}"
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise CheckpointError(
            f"{wanted}: there is no such folder here, and models of the Hugging Face Hub need huggingface_hub; "
            "correct the path, or pip install 'pymerge-engine[hub]'"
        ) from error
    with _explained(wanted, repository):
        cached = _cached(repository, revision)
        if cached is not None and _has_weights(cached):
            return cached
        if constants.HF_HUB_OFFLINE and cached is not None:
            raise CheckpointError(
                f"{wanted}: its weights are not all in the cache ({cached}), and HF_HUB_OFFLINE is set; "
                "unset it to download them"
            )
        return _download(repository, revision)


def _cached(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Asked for one small file: other files may rightly be missing, such as weights in another format.
        found = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except LocalEntryNotFoundError:
        return None
    return Path(str(found))


def _has_weights(folder: Path) -> bool:
    try:
        form, *_ = find_weights(folder)
    except CheckpointError:
        return False
    return form in FORMATS  # a file of GGUF may be there because it was wanted once, beside the weights themselves


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download

    folder = Path(str(snapshot_download(repository, revision=revision, ignore_patterns=_NOT_WEIGHTS)))
    for form in FORMATS:
        for patterns in _weight_patterns(folder, form):
            snapshot_download(repository, revision=folder.name, allow_patterns=patterns)
            if _has_weights(folder):
                return folder
    if any(name.endswith(".gguf") for name in list_repo_files(repository, revision=folder.name)):
        raise CheckpointError(
            f"{repository}: has weights in files of GGUF alone, one for each encoding; download one "
            f"(`hf download {repository} FILE.gguf`) and give its path"
        )
    find_weights(folder)  # says what is there instead
    return folder


def _weight_patterns(folder: Path, form: WeightFormat) -> Iterator[list[str]]:
    """Patterns to ask for until there are weights: the shards of the index, the usual file, one of another name."""
    index = folder / (form.stem + form.index_suffix)
    if index.is_file():
        yield sorted(set(read_weight_map(index, form).values()))
    yield [form.single]
    yield [f"*{suffix}" for suffix in form.suffixes]


@contextmanager
def _explained(wanted: str, repository: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{wanted}: is gated; accept its terms at {constants.ENDPOINT}/{repository} and run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{wanted}: the model has no such revision; name a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{wanted}: is no folder here and no model of the Hub that may be read; correct the name, "
            "or run `hf auth login` if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise CheckpointError(
            f"{wanted}: is no folder here and not in the cache {constants.HF_HUB_CACHE}, and {reason}; correct the "
            f"path, or run `hf download {repository}` where there is a network"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{wanted}: is no folder here and no name of the Hub; correct the path") from error
    except OSError as error:
        raise CheckpointError(f"{wanted}: downloading it failed ({error}); run the same command again") from error
