"""Every assignment into Megatron or torch, in tables of rows with a reason and the upstream line that they answer.

| file | what its patches are for |
|---|---|
| ``patching.py`` | the mechanism: installs tables in order, refuses other replacements, takes tables back |
| ``cpu.py`` | the CPU engine |
| ``parsing.py`` | before flags are parsed: symbols of layers, sizes of vocabularies |
| ``unpickling.py`` | pickles of admitted classes alone |
| ``building.py`` | building and training hybrids |
| ``missing_packages.py`` | mamba_ssm, flash-linear-attention, Apex and Transformer Engine where they are missing |
| ``gloo.py`` | collectives that Gloo does not have |
| ``optimizer_state.py`` | the optimizer's state in checkpoints |
| ``routers.py`` | tokens of experts, and the losses of routers |
| ``experts.py`` | the way of tokens to their experts and back |
| ``swiglu_kernels.py`` | SwiGLU in one kernel each way |
| ``hooks.py`` | what a run hooks into the training loop, from the innermost out |
| ``child_processes.py`` | processes that a rank starts |
| ``meta.py`` | models without memory |
| ``upstream.py`` | which of these tables a process needs |

Each row has an entry in ``tests/patches``, which fails when the code that it relies on changes.
"""
