"""Files of GGUF, read as models of transformers."""
