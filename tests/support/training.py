"""What the ranks run: Megatron's own set-up, steps and checkpoints, on small models and fixed batches."""

import math
from pathlib import Path
from typing import Any

SIZES = """--hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --ffn-hidden-size 48
--seq-length 32 --max-position-embeddings 32 --vocab-size 64 --make-vocab-size-divisible-by 16 --swiglu
--disable-bias-linear --normalization RMSNorm --position-embedding-type rope --rotary-base 500000
--use-rope-scaling --rope-scaling-factor 32 --swa-window 9 --swa-sinks 3 --mamba-head-dim 8 --mamba-num-groups 2
--mamba-state-dim 8 --intra-num-attention-heads 4 --intra-num-query-groups 2 --intra-qk-dim 16
--intra-value-dim 32 --intra-ssm-dim 32 --mamba-a-init-range 0.01 2.0 --hidden-dropout 0
--attention-dropout 0 --init-method-std 0.1 --linear-num-key-heads 4 --linear-num-value-heads 4
--linear-key-head-dim 8 --linear-value-head-dim 8"""
EOD = 63
"""Of the NullTokenizer with a vocabulary of 64."""
MOE = """--num-experts 4 --moe-router-topk 1 --moe-ffn-hidden-size 24 --moe-shared-expert-intermediate-size 24
--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3
--moe-router-load-balancing-type none --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall"""
STEPS = """--micro-batch-size 1 --global-batch-size 4 --train-iters 20 --lr 1e-3 --min-lr 1e-3
--lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --tokenizer-type NullTokenizer
--mock-data --seed 7 --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"""


class Run:
    """A model with its optimizer on this rank, set up by Megatron from a command line."""

    def __init__(self, pattern: str, flags: str = ""):
        from megatron.core.enums import ModelType
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.initialize import initialize_megatron
        from megatron.training.training import setup_model_and_optimizer

        from megatron_hybrid.cli import arguments
        from megatron_hybrid.cli import flags as command_line
        from megatron_hybrid.model.build import model_config
        from megatron_hybrid.training.loss import forward_step

        forget()
        moe = MOE if "E" in pattern else ""
        sizes = SIZES.replace("--use-rope-scaling", "") if "--position-embedding-type none" in flags else SIZES
        argv = f"{sizes} {moe} {STEPS} {flags}".split() + ["--hybrid-layer-pattern", pattern]
        self.args = arguments.parse(command_line.resolve(argv).argv, "cpu")
        initialize_megatron()
        self.forward_step = forward_step
        container = pretrain_cfg_container_from_args(self.args, model_config(self.args))
        self.model, self.optimizer, self.scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            checkpointing_context={},
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.iteration = self.args.iteration

    def step(self) -> tuple[float, float]:
        """One training step on the batch of its iteration: loss (averaged over ranks) and gradient norm."""
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.utils import get_model_config
        from megatron.training.training import train_step

        config = get_model_config(self.model[0])
        if config.finalize_model_grads_func is None:
            from megatron.core.distributed import finalize_model_grads

            config.finalize_model_grads_func = finalize_model_grads
            config.grad_scale_func = self.optimizer.scale_loss
        for chunk in self.model:
            chunk.train()
        batches = [RerunDataIterator(self._batches()) for _ in self.model]
        losses, *_, grad_norm, _, _ = train_step(
            self.forward_step,
            batches if len(batches) > 1 else batches[0],
            self.model,
            self.optimizer,
            self.scheduler,
            config,
            get_forward_backward_func(),
            iteration=self.iteration,
        )
        self.iteration += 1
        self.args.consumed_train_samples += self.args.global_batch_size
        value = torch.tensor(float(losses["lm loss"]) if losses else -math.inf)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return float(value), float(grad_norm)

    def save(self, folder: str) -> None:
        from megatron.training.checkpointing import save_checkpoint

        self.args.save = folder
        save_checkpoint(self.iteration, self.model, self.optimizer, self.scheduler, 0)

    def parameters(self) -> dict[str, Any]:
        """Local parameters by name."""
        return {
            f"{i}.{name}": p.detach().clone()
            for i, chunk in enumerate(self.model)
            for name, p in chunk.named_parameters()
        }

    def optimizer_state(self) -> dict[str, Any]:
        """Local first and second moments, main weights and step counts of the distributed optimizer."""
        state: dict[str, Any] = {}
        for i, part in enumerate(getattr(self.optimizer, "chained_optimizers", [self.optimizer])):
            for j, group in enumerate(part.optimizer.param_groups):
                state[f"{i}.{j}.step"] = group.get("step")
                for k, p in enumerate(group["params"]):
                    state[f"{i}.{j}.{k}.main"] = p.detach().clone()
                    for name, value in part.optimizer.state[p].items():
                        state[f"{i}.{j}.{k}.{name}"] = value.clone() if hasattr(value, "clone") else value
        return state

    def _batches(self) -> Any:
        """This data-parallel rank's micro-batches of the iteration's global batch, split as Megatron's sampler does."""
        import torch
        from megatron.core import mpu

        dp, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        generator = torch.Generator().manual_seed(1000 + self.iteration)
        size, length = self.args.global_batch_size, self.args.seq_length
        tokens = torch.randint(0, 64, (size, length + 1), generator=generator)
        if self.args.reset_attention_mask:  # documents of about seven tokens
            tokens[torch.rand(tokens.shape, generator=generator) < 0.15] = EOD
        mask = torch.ones(size, length)
        if self.args.eod_mask_loss:  # unevenly: a few tokens of the first half, most of the second, all of one sample
            mask[:, : length // 2] = (torch.rand(size, length // 2, generator=generator) > 0.1).float()
            mask[:, length // 2 :] = (torch.rand(size, length - length // 2, generator=generator) > 0.8).float()
            mask[-1] = 0
        micro = self.args.micro_batch_size
        for start in range(rank * micro, size, dp * micro):
            part = tokens[start : start + micro]
            yield {
                "tokens": part[:, :-1].contiguous(),
                "labels": part[:, 1:].contiguous(),
                "loss_mask": mask[start : start + micro].contiguous(),
                "position_ids": torch.arange(length).expand(micro, -1).contiguous(),
            }


def forget() -> None:
    """Takes Megatron's globals back to before the first run in this process."""
    from megatron.core import mpu
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.training import checkpointing, global_vars

    checkpointing._LOADED_ITERATION = None
    global_vars.destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    MTPLossLoggingHelper.tracker = {}
    destroy_moe_metrics_tracker()
    mpu.destroy_model_parallel()


def initial_checkpoint(pattern: str, folder: str, flags: str = "") -> None:
    """Saves freshly initialised weights."""
    run = Run(pattern, f"--no-save-optim {flags}")
    run.save(folder)


def losses(pattern: str, load: str, flags: str, steps: int = 3) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first steps from saved weights."""
    run = Run(pattern, f"--load {load} --no-load-optim --no-load-rng --finetune {flags}")
    return [run.step() for _ in range(steps)]


def continued(pattern: str, flags: str, load: str, save: str = "", steps: int = 2) -> dict[str, Any]:
    """State right after loading, saved again if asked, then some steps.

    Returns:
        ``parameters`` and ``optimizer`` (this rank's, as loaded) and ``steps`` (losses and norms).
    """
    run = Run(pattern, f"--load {load} {flags}")
    found = {"parameters": run.parameters(), "optimizer": run.optimizer_state()}
    if save:
        run.save(save)
    return {**found, "steps": [run.step() for _ in range(steps)]}


def trained(pattern: str, flags: str, save: str, before: int, after: int) -> dict[str, Any]:
    """Trains from initialisation, saves after ``before`` steps, goes on for ``after``; state at both points."""
    run = Run(pattern, flags)
    steps = [run.step() for _ in range(before)]
    run.save(save)
    at_save = {"parameters": run.parameters(), "optimizer": run.optimizer_state()}
    steps += [run.step() for _ in range(after)]
    return {
        **at_save,
        "steps": steps,
        "end_parameters": run.parameters(),
        "end_optimizer": run.optimizer_state(),
    }


def resumed(pattern: str, flags: str, load: str, steps: int) -> dict[str, Any]:
    """Loads and goes on; steps and the state at the end."""
    run = Run(pattern, f"--load {load} {flags}")
    done = [run.step() for _ in range(steps)]
    return {"steps": done, "end_parameters": run.parameters(), "end_optimizer": run.optimizer_state()}


def folder(path: Path) -> str:
    path.mkdir(parents=True, exist_ok=True)
    return str(path)
