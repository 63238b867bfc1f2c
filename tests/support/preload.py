"""What every rank imports. The server that ranks are forked from imports it once, where it is on its path."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

from megatron_hybrid.cli import arguments
from megatron_hybrid.patches import cpu, upstream  # noqa: E402

torch.set_num_threads(1)
cpu.install()
arguments.import_megatron_quietly()

import pretrain_hybrid  # noqa: E402, F401
from megatron_hybrid.model.loss_head import HybridLossModel  # noqa: E402
from megatron_hybrid.model.stack import HybridLayerStack  # noqa: E402
from megatron_hybrid.training import run  # noqa: E402, F401

upstream.prepare("cpu", HybridLayerStack, HybridLossModel)
