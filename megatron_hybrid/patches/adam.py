"""Adam with the contract of Apex's and Transformer Engine's FusedAdam, in plain torch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam (or AdamW) whose step count lives in the parameter group, not in each parameter's state.

    Megatron's distributed optimizer shards and checkpoints exactly the tensors of ``state``; torch's own Adam
    keeps a 0-d ``step`` tensor there, which upstream loads as one tensor shared by all parameters
    (core/optimizer/distrib_optimizer.py:1025-1033), so that resumed runs count steps several times over.
    The arithmetic is torch's multi-tensor AdamW on the same tensors.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled when ``adam_w_mode``, else added to the gradient.
        adam_w_mode: AdamW rather than Adam with L2 regularisation.
        capturable: CUDA graphs of the optimizer step; refused.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if capturable:
            raise ValueError(
                "--optimizer-cuda-graph needs Transformer Engine's or Apex's FusedAdam: install one of them "
                "or drop the flag."
            )
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        from torch.optim.adam import adam

        if closure is not None:
            raise ValueError("FusedAdam takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            # torch's function counts a step of its own: hand it the count before this one
            steps = [torch.tensor(float(group["step"] - 1)) for _ in params]
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                steps,
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )
