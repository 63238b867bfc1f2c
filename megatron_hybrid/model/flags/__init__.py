"""Megatron's flags: what becomes of each (:mod:`.table`), and of their values (:mod:`.rules`)."""
