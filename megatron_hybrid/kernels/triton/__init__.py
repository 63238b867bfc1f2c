"""Kernels in Triton, for CUDA; none is compiled or imported before it is first called.

The modules of this package import Triton, and nothing imports them at the start of a run on CPUs. They are plain
functions of tensors; :mod:`megatron_hybrid.kernels` says which of them serve which layer.
"""
