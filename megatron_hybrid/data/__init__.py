"""From text to Megatron's indexed data sets: readers, tokenizers, writers.

Nothing here imports Megatron or torch: a command-line tool would pay about 6 s for it at each
start.
"""
