"""Quantised formats whose values can be had exactly: recognised by their tensors, and decoded when they are read."""
