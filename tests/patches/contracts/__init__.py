"""Contracts by patched area."""

from tests.patches.contracts import activations, checkpoints, data, model, optimizer, processes, routed, training

CONTRACTS = [
    contract
    for area in (activations, checkpoints, data, model, optimizer, processes, routed, training)
    for contract in area.CONTRACTS
]
