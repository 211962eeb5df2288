"""Kernels and their launchers; `reference` holds the plain PyTorch twin of every op.

The backends `reference`, `cpu` (C++, csrc) and `triton_ops` offer the same functions with the same
signatures. Triton kernels have one file per op, named after it.
"""
