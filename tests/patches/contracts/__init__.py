"""Contracts by patched area."""

from tests.patches.contracts import checkpoints, data, model, optimizer, processes, training

CONTRACTS = [
    contract for area in (checkpoints, data, model, optimizer, processes, training) for contract in area.CONTRACTS
]
