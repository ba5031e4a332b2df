"""Backends compute ops: `runner` chooses; the folder of each has a module for every op with code of its own."""
