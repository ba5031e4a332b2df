"""Wheels for Linux that need no compiler where they are installed: `make wheel`, `make wheel-test`."""
