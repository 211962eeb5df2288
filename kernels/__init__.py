"""Kernels and their launchers; `reference` holds the plain PyTorch twin of every op.

The backends `reference`, `cpu` (C++, csrc/cpu), `triton_ops` and `cuda` (CUDA C++, csrc/cuda) offer
the same functions with the same signatures. Triton kernels have one file per op, named after it.
"""
