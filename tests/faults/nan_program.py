"""pretrain_hybrid.py with a loss that is NaN once: FAULT_NAN names a file with the iteration and the rank."""

import os
import sys
from pathlib import Path
from typing import Any

import pretrain_hybrid
from megatron_hybrid.training.loss import forward_step


def faulty(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    from megatron.training import get_args

    losses, reduce = forward_step(data_iterator, model)
    order = Path(os.environ["FAULT_NAN"])
    if order.exists():
        iteration, rank = map(int, order.read_text().split())
        if model.training and (get_args().curr_iteration + 1, get_args().rank) == (iteration, rank):
            order.unlink()
            losses = losses * float("nan")
    return losses, reduce


if __name__ == "__main__":
    from megatron_hybrid.training import loss

    loss.forward_step = faulty  # before training/run.py takes it from there
    pretrain_hybrid.main(sys.argv[1:])
