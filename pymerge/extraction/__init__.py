"""Adapters made: of a fine-tuned model as factors of low rank with the error that they have, of adapters by a merge."""
