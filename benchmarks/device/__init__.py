"""One run on a machine with a GPU, in at most 8 minutes and without network: tests, then figures."""
