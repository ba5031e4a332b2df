"""Checkpoints on disk, read: headers of weight files, positional reads, names of the Hub."""
