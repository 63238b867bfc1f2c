"""Kernels in Triton. Each module is imported where it is used: importing Triton takes time, and CPU runs need none."""
