"""The `pymerge` command: options, tables, messages."""
