"""Contracts by patched area."""

from tests.patches.contracts import checkpoints, data, model, optimizer, processes, routed, training

CONTRACTS = [
    contract
    for area in (checkpoints, data, model, optimizer, processes, routed, training)
    for contract in area.CONTRACTS
]
