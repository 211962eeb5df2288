"""Kernels and their launchers; `reference` holds the plain PyTorch twin of every op.

Every module of implementations (`reference`, `cpu`) offers the same functions with the same
signatures.
"""
