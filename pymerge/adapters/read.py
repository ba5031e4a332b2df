"""Adapters read, whatever the form of their files."""

from __future__ import annotations

from pymerge.adapters.diffusers import read_diffusers
from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.forms import Form
from pymerge.adapters.keys import Keys, read_keys
from pymerge.adapters.kohya import read_kohya
from pymerge.adapters.mlx import read_mlx
from pymerge.adapters.settings import Settings, read_settings
from pymerge.checkpoint.checkpoint import Checkpoint


def read_adapter(base: Checkpoint, files: AdapterFiles) -> tuple[Settings, Keys]:
    """Settings and tensors of an adapter for this base. Raises CheckpointError for all that cannot be read."""
    if files.form is Form.PEFT:
        return read_settings(files.config_file, files.config), read_keys(files.tensors)
    read = {Form.MLX: read_mlx, Form.DIFFUSERS: read_diffusers, Form.KOHYA: read_kohya}[files.form]
    return read(base, files)
