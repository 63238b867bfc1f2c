"""Every reach into Megatron's or torch's internals, one function each.

``cpu`` lets the unmodified training loop run without a GPU; ``upstream`` fills the gaps that are left when
Transformer Engine, Apex or mamba_ssm are missing, and registers our layer symbols; ``training`` hooks the
FLOPs counter and the metrics file into the loop; ``meta`` builds models without memory; ``arguments`` turns
the command line into Megatron's; ``datasets`` compares the data with the model, and ``gpt_dataset`` keys the order of
documents by their content. Nothing is replaced on import.
"""
