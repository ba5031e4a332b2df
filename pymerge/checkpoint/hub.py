"""Models of the Hugging Face Hub: from its cache on this machine, downloaded into it where they are not there yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pymerge.checkpoint.beside import is_other_form
from pymerge.checkpoint.checkpoint import weights_of
from pymerge.checkpoint.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFUSERS_WEIGHTS,
    MLX_WEIGHTS,
    SKIPPED_FOLDERS,
    WEIGHT_SUFFIXES,
    is_skipped,
    is_weight_file,
)
from pymerge.checkpoint.pipelines import is_pipeline
from pymerge.checkpoint.sentence_modules import read_modules
from pymerge.checkpoint.weight_files import (
    choose,
    file_names,
    has_usual,
    named_weights,
    no_weights,
    read_weight_map,
)
from pymerge.common.names import first_few
from pymerge.errors import CheckpointError

_NOT_WEIGHTS = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES] + [f"{folder}/*" for folder in SKIPPED_FOLDERS]


def fetch(repository: str, revision: str | None) -> Path:
    """Folder of a model in the cache of huggingface_hub; its name is the commit.

    A cached revision with all its weights is used as it is, without asking the Hub whether there is a newer one.
    Otherwise what a merge needs is downloaded, with a progress bar: weights in one format, those that transformers
    would load, and the files that an output takes over. No code of a model is run. Raises CheckpointError when that is
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
        cached = cached_folder(repository, revision)
        if cached is not None and _is_whole(cached):
            return cached
        if constants.HF_HUB_OFFLINE and cached is not None:
            raise CheckpointError(
                f"{wanted}: its weights are not all in the cache ({cached}), and HF_HUB_OFFLINE is set; "
                "unset it to download them"
            )
        return _download(repository, revision)


def cached_folder(repository: str, revision: str | None) -> Path | None:
    """Folder of a model in the cache, None if it is not there; needs huggingface_hub, and no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Asked for one small file: other files may rightly be missing, such as weights in another format.
        found = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except LocalEntryNotFoundError:
        return None
    return Path(str(found))


def _is_whole(folder: Path) -> bool:
    """Whether a model's weights are all there, those of its modules too, or an adapter's."""
    if _adapter_weights(file_names(folder)) is not None:
        return True
    try:
        # A file of GGUF may be there because it was wanted once, beside the weights themselves.
        return all(file.suffix != ".gguf" for file in weights_of(folder))
    except CheckpointError:
        return False


def _adapter_weights(names: Collection[str]) -> str | None:
    """The weight file of an adapter alone, by the names in its folder; None if that holds something else."""
    if "config.json" in names:
        return None
    usual = (*ADAPTER_WEIGHTS, MLX_WEIGHTS) if ADAPTER_CONFIG in names else ()
    return next((name for name in (*usual, *DIFFUSERS_WEIGHTS) if name in names), None)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    folder = Path(str(snapshot_download(repository, revision=revision, ignore_patterns=_NOT_WEIGHTS)))
    wanted = _weights_wanted(folder, repository, HfApi().list_repo_files(repository, revision=folder.name))
    snapshot_download(repository, revision=folder.name, allow_patterns=wanted)
    return folder


def _weights_wanted(folder: Path, repository: str, names: Sequence[str]) -> list[str]:
    """Weight files to download of those of a repository, whose other files are in `folder`: the model's in one format,
    those of its modules, and what an output takes over.

    Raises CheckpointError where none are the model's, or where it is open which ones.
    """
    inside: dict[str, list[str]] = {}
    for name in names:
        inside.setdefault(name.rpartition("/")[0], []).append(name.rpartition("/")[2])
    top = inside.get("", [])
    if is_pipeline(top):
        parts = sorted({name.partition("/")[0] for name in names if "/" in name and is_weight_file(name)})
        raise CheckpointError(
            f"{repository}: is a diffusers pipeline of several models; run `hf download {repository}`, and merge its "
            f"components one by one, by their folders: {first_few(parts, 12)}"
        )
    if (adapter := _adapter_weights(top)) is not None:
        return [adapter]
    wanted: list[str] = []
    owners: list[str] = []
    for where in dict.fromkeys([*(part.folder for part in read_modules(folder) if part.folder), ""]):
        if where == "" and owners and not has_usual(top):
            continue
        choice = choose(folder / where, inside.get(where, []), named_weights(folder / where))
        if choice is not None:
            found = [choice.name]
            if choice.is_index:
                found = sorted(set(read_weight_map(folder / where / choice.name, choice.form).values()))
            wanted += [Path(where, name).as_posix() for name in found]
            owners.append(where)
    if not wanted and any(name.endswith(".gguf") for name in names):
        raise CheckpointError(
            f"{repository}: has weights in files of GGUF alone, one for each encoding; download one "
            f"(`hf download {repository} FILE.gguf`) and give its path"
        )
    if not wanted:
        raise no_weights(folder, top)
    beside = [name for name in names if name not in wanted and is_weight_file(name)]
    return wanted + [
        name
        for name in beside
        if not (is_other_form(PurePosixPath(name), owners) or any(map(is_skipped, name.split("/")[:-1])))
    ]


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
