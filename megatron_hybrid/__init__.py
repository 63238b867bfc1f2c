"""Pretraining of hybrid (attention + Mamba-2) language models on Megatron-Core.

Importing this package imports neither torch nor Megatron.
"""

__version__ = "0.1.0"
