"""What computes ops: `runner` chooses; a folder a backend has a module for each op that it has code of its own for."""
