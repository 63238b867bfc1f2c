"""Kernels in Triton. A module of this package imports Triton; nothing imports one before a CUDA tensor needs it."""
