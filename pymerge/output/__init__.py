"""Checkpoints on disk, written: layouts, resumable writes, publishing, manifests and their verification."""
