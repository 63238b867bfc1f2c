"""Builds single layers of a model's command line in one process and measures them: for tools/benchmarks/layers.py."""

import argparse
import contextlib
import gc
import io
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hybrid import costs
from megatron_hybrid.benchmarks.timing import peak_memory
from megatron_hybrid.cli import flags, recipes
from megatron_hybrid.layers.intra.design import IntraDesign, design

# On a CPU: a quarter of the 100M recipe's widths, branches of equal width.
SMALL = """--hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 8 --num-query-groups 2 --mamba-num-heads 16
--mamba-head-dim 32 --mamba-state-dim 32 --intra-num-attention-heads 4 --intra-num-query-groups 2 --intra-qk-dim 144
--intra-value-dim 256 --intra-ssm-dim 256 --swa-window 128 --swa-sinks 16"""

WARM_UP = 5
"""Steps of each layer before those that are timed: one compiles, one is checked, one is watched for its memory."""
BUDGET_MS = 2000.0
"""Of the timed repeats of one layer, between these numbers of repeats."""
FEWEST, MOST = 5, 20


@dataclass
class Case:
    """A row: the layers of a pattern."""

    name: str
    pattern: str
    flags: list[str] = field(default_factory=list)
    preset: str = ""
    alone: str = ""
    """Symbol of an intra-layer hybrid that stands for its attention branch alone in this pattern."""


class AttentionAlone(nn.Module):
    """The attention branch of a P layer between projections of its own, in P's place in the layer's spec."""

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        pg_collection: Any,
        design: IntraDesign,
        rope: Any,
        pp_layer_offset: int = 0,
        cp_comm_type: str | None = None,
        name: str | None = None,
    ):
        super().__init__()
        from megatron.core.transformer.spec_utils import build_module

        from megatron_hybrid.layers.intra.module import AttentionBranch

        self.config = config
        self.branch = AttentionBranch(
            config=config,
            design=design,
            core_attention=submodules.core_attention,
            pg_collection=pg_collection,
            layer_number=layer_number,
            pp_layer_offset=pp_layer_offset,
        )
        self.rotary = rope.build(design.qk_head_dim, config, pg_collection.cp) if rope else None
        shared = {"config": config, "bias": False, "is_expert": False, "tp_group": pg_collection.tp}
        column = {"init_method": config.init_method, "gather_output": False, "skip_bias_add": False}
        row = {"init_method": config.output_layer_init_method, "input_is_parallel": True, "skip_bias_add": True}
        hidden, rows = config.hidden_size, attention_rows(design)
        self.in_proj = build_module(submodules.in_proj, hidden, rows, **shared, **column, tp_comm_buffer_name="fc1")
        self.out_proj = build_module(
            submodules.out_proj, design.value_dim, hidden, **shared, **row, tp_comm_buffer_name="fc2"
        )

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **unused: Any) -> tuple[Tensor, Any]:
        """[s, b, h] to ([s, b, h], None)."""
        from megatron_hybrid.layers.attention.module import rotary_table

        angles = rotary_table(self.rotary, hidden_states, self.config, None, None)
        projected, _ = self.in_proj(hidden_states)
        return self.out_proj(self.branch(projected, None, rotary_pos_emb=angles)[0])


def attention_rows(d: IntraDesign) -> int:
    """Width of q, k and v of one attention branch."""
    parts = d.branch_parts(d.branches.index("attention"))
    return sum(part.rows for part in d.in_parts if part.name in parts)


class Bench:
    """Builds and measures layers in this process, which is one rank of one.

    Args:
        options: Those of tools/benchmarks/layers.py.
        rest: Flags for the model's command line.

    Raises:
        ValueError: Flags that no model can have.
    """

    def __init__(self, options: argparse.Namespace, rest: list[str]):
        from megatron_hybrid.cli import arguments
        from megatron_hybrid.patches import upstream

        self.options = options
        self.cuda = options.device == "cuda"
        known = recipes.recipe(options.recipe).flags
        self.base = ["--recipe", options.recipe, *(SMALL.split() if options.size == "small" else [])]
        self.rest = [*rest, "--vocab-size", "128", "--no-gradient-accumulation-fusion"]
        if options.dtype == "bf16" or known.get("--bf16"):
            self.rest.append("--bf16" if options.dtype == "bf16" else "--no-bf16")
        if options.deterministic:
            self.rest.append("--deterministic-mode")
        self.dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        arguments.choose_device(options.device)
        args = self.parse(Case("", "*"), options.length[0])  # a mistake in the flags ends the program here
        from megatron.core import mpu
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        from megatron_hybrid.model.loss_head import HybridLossModel
        from megatron_hybrid.model.stack import HybridLayerStack

        logging.getLogger("megatron").setLevel(logging.WARNING)
        self.notes = upstream.prepare(options.device, HybridLayerStack, HybridLossModel, args.ssm_kernels)
        torch.distributed.init_process_group("nccl" if self.cuda else "gloo")
        mpu.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)

    def parse(self, case: Case, length: int) -> argparse.Namespace:
        """Megatron's arguments of a row."""
        from megatron_hybrid.cli import arguments

        batch = self.options.micro_batch
        sizes = f"--seq-length {length} --max-position-embeddings {length}"
        batches = f"--micro-batch-size {batch} --global-batch-size {batch}"
        argv = [*self.base, *case.flags, *self.rest, *sizes.split(), *batches.split()]
        command = flags.resolve([*argv, f"--hybrid-layer-pattern={case.pattern}"])
        return arguments.parse(command.argv, self.options.device, print_config=True)

    def design(self, chosen: list[str]) -> IntraDesign:
        """What P is with these flags at this run's sizes.

        Raises:
            ValueError: They do not fit the sizes.
        """
        return design(self.parse(Case("", "P", chosen), self.options.length[0]))

    def build(self, case: Case, length: int) -> tuple[nn.ModuleList, costs.Sizes]:
        """The layers of a row, as a training would hold them."""
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.spec_utils import ModuleSpec

        from megatron_hybrid.model.build import model_config

        args = self.parse(case, length)
        config = model_config(args)
        if case.alone and case.alone in case.pattern:
            layer = config.hybrid_stack_spec.submodules.layers[case.alone].submodules
            intra = layer.self_attention
            params = {name: intra.params[name] for name in ("design", "rope")}
            layer.self_attention = ModuleSpec(AttentionAlone, params=params, submodules=intra.submodules)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        with contextlib.redirect_stdout(io.StringIO()):  # upstream says how it pads the vocabulary
            model = config.get_builder_cls()(config).build_model(groups, True, True).cuda()
        if self.dtype == torch.bfloat16:
            model = Float16Module(model.config, model).module
        return model.decoder.layers.train(), costs.sizes_of(args)

    def step(self, layers: nn.ModuleList, length: int, hidden: int) -> Callable[..., bool]:
        """What is timed; asked to check, it says whether output and gradients are finite."""
        x, dy = (
            torch.randn(length, self.options.micro_batch, hidden, device="cuda", dtype=self.dtype) for _ in range(2)
        )
        leaves = [x.requires_grad_(), *layers.parameters()]

        def run(check: bool = False) -> bool:
            y = x
            for layer in layers:
                y = layer(hidden_states=y, attention_mask=None)
                y = y[0] if isinstance(y, tuple) else y
            y.backward(dy)
            found = [y, *(t.grad for t in leaves)] if check else []
            finite = all(bool(torch.isfinite(t).all()) for t in found if t is not None)
            for t in leaves:
                t.grad = None
            return finite

        return run

    def measure(self, cases: list[Case], length: int, peaks: dict[str, float]) -> list[dict[str, Any]]:
        """One row for each case, those that fail with ``error`` in place of times."""
        rows, steps = [], {}
        for i, case in enumerate(cases):
            row: dict[str, Any] = {"length": length, "preset": case.preset, "name": case.name}
            rows.append(row)
            try:
                layers, sizes = self.build(case, length)
                tokens = length * self.options.micro_batch
                row["flops"] = 3 * tokens * sum(forward_flops(s, sizes, case.alone) for s in case.pattern)
                row["bytes"] = sum(traffic(layer, tokens, sizes.hidden) for layer in layers)
                run = self.step(layers, length, sizes.hidden)
                run()
                if not run(check=True):
                    raise FloatingPointError("output or gradients are not finite")
                row["peak_mib"] = peak_memory(run, torch.device(self.options.device)) / 2**20
                steps[i] = run
            except Exception as error:  # whatever it is, the other layers are measured
                row["error"] = f"{type(error).__name__}: {error}"
        try:
            timed = times_ms(list(steps.values()), self.options.repeats)
        except RuntimeError as error:  # out of memory: steps that are queued hold more than one
            timed = []
            for i in steps:
                rows[i]["error"] = f"{type(error).__name__}: {error}"
        for i, times in zip(steps, timed, strict=bool(timed)):
            summarise(rows[i], times, length * self.options.micro_batch, peaks)
        steps.clear()
        gc.collect()  # the modules refer to themselves
        return rows

    def close(self) -> None:
        torch.distributed.destroy_process_group()


def forward_flops(symbol: str, sizes: costs.Sizes, alone: str) -> float:
    """Forward FLOPs per token of a layer, or of P's attention branch alone."""
    if symbol != alone:
        return costs.layer_flops_per_token(symbol, sizes)
    d = sizes.of(symbol)
    seen = None if d.window is None else d.window + d.sinks
    core = costs.attention_core_flops(d.qk_dim, d.value_dim, sizes.seq_length, seen)
    return 2 * sizes.hidden * (attention_rows(d) + d.value_dim) + core


def traffic(layer: nn.Module, tokens: int, hidden: int) -> int:
    """The least bytes that a forward and a backward pass move, if nothing stays in a cache between two kernels.

    Weights are read in both passes and their gradient is written: 3. For each token, the layer's input is read in both
    passes, its output written, the output's gradient read and the input's written: 5 x hidden. What stands between
    the two projections (the output of the first, the input of the second) is written and read, read again in the
    backward pass, and its gradient written and read: 5 x their widths. All else (heads, states, norms, convolutions)
    could stay on the chip. Each projection has the hidden size on one side, so its weights divided by it are the width.
    """
    weights = list(layer.parameters())
    projections = sum(p.numel() for p in weights if p.dim() == 2 and hidden in p.shape)
    size = weights[0].element_size()
    return 3 * sum(p.numel() * p.element_size() for p in weights) + 5 * size * tokens * (hidden + projections // hidden)


def times_ms(steps: list[Callable], repeats: int | None) -> list[list[float]]:
    """Milliseconds of each step in each round, after warm-up. The CPU engine answers for the events without CUDA.

    Steps are queued without waiting for the device, as in training.

    Args:
        steps: Each has run before.
        repeats: Rounds; None for as many as fit the budget.
    """

    def rounds(count: int) -> list[list[float]]:
        marks = [[[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(count)] for _ in steps]
        torch.cuda.synchronize()
        for i in range(count):
            for step, (begin, end) in zip(steps, (row[i] for row in marks), strict=True):
                begin.record()
                step()
                end.record()
        torch.cuda.synchronize()
        return [[begin.elapsed_time(end) for begin, end in row] for row in marks]

    if not steps:
        return []
    warm = sum(min(row) for row in rounds(WARM_UP - 3))
    return rounds(repeats or min(MOST, max(FEWEST, int(BUDGET_MS * len(steps) / warm))))


def measure_peaks(dtype: torch.dtype, cuda: bool) -> dict[str, float]:
    """FLOP/s of a large square matrix product and bytes/s of a large copy (each byte is read and written)."""
    n, count = (8192, 2**28) if cuda else (1024, 2**26)
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.ones(count, device="cuda")
    target = torch.empty_like(source)
    product, copy = times_ms([lambda: torch.mm(a, b), lambda: target.copy_(source)], MOST)
    return {"flops_per_s": 2e3 * n**3 / min(product), "bytes_per_s": 8e3 * count / min(copy)}


def summarise(row: dict[str, Any], times: list[float], tokens: int, peaks: dict[str, float]) -> None:
    median = statistics.median(times)
    bound = 1e3 * max(row["flops"] / peaks["flops_per_s"], row["bytes"] / peaks["bytes_per_s"])
    row |= {"times_ms": times, "median_ms": median, "tokens_per_s": 1e3 * tokens / median}
    row |= {"bound_ms": bound, "roofline_percent": 100 * bound / median}
