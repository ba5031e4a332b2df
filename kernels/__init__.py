"""Triton kernels. They import triton and torch only; pymerge.backends.triton calls them."""
