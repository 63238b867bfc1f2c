"""What a pattern costs: sums over layers, ranks and stages. Imports neither torch nor Megatron.

What a layer costs, it states itself (``layers/<family>/account.py``), in the terms of ``accounting/``. In the order of
the flow; each file imports those above it only:

========================  ==========================================================================
``sizes``                 the sizes of a model, from flags
``parameters``            parameters of layers and models
``flops``                 training FLOPs, in two conventions
``caches``                what is kept of a context in generation: keys and values, states
``match``                 blocks for equal parameters, tokens for equal FLOPs
``stages``                what each pipeline stage holds
``buffers``               Megatron's gradient buffers: padding, buckets, shards of the distributed optimizer
``memory``                parameters, gradients and optimizer state of each rank, in bytes
``balance``               pipeline stages of equal work
``hardware``              GPUs: dense peaks, memory, bandwidths, and where they are stated
``schedule``              the pipeline's schedule: micro-batches in flight, the bubble, a step's time
``activations``           bytes saved for the backward pass: of a layer, a micro-batch, and a stage at its peak
``communication``         what a rank sends for a layer, and in a training step
========================  ==========================================================================
"""

from megatron_hybrid.accounting.activation_settings import ActivationSettings, Recompute
from megatron_hybrid.accounting.attention_core import attention_core_flops
from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.scan import Convention, ssd_scan_flops, ssm_core_flops
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.storage import Storage
from megatron_hybrid.accounting.tensors import Parameters
from megatron_hybrid.accounting.traffic import GROUPS, CommunicationSettings, Traffic
from megatron_hybrid.costs.activations import activation_table, layer_activation_bytes, stage_activation_bytes
from megatron_hybrid.costs.balance import balance_pipeline, equal_count, imbalance, segment_work, stage_work
from megatron_hybrid.costs.caches import CONTEXT_LENGTHS, layer_cache, model_cache
from megatron_hybrid.costs.communication import layer_communication, step_communication
from megatron_hybrid.costs.flops import (
    head_flops_per_token,
    layer_flops_per_token,
    mtp_flops_per_token,
    training_flops,
    training_flops_per_token,
)
from megatron_hybrid.costs.hardware import Gpu, gpu, gpu_of_device
from megatron_hybrid.costs.match import match_flops, match_parameters
from megatron_hybrid.costs.memory import (
    ModelStates,
    RankMemory,
    StageParameters,
    largest_rank,
    rank_memory,
    stage_parameters,
)
from megatron_hybrid.costs.model_sizes import sizes_of
from megatron_hybrid.costs.parameters import ModelParameters, layer_parameters, model_parameters
from megatron_hybrid.costs.schedule import bubble_fraction, in_flight, pipeline_bubble, pipeline_time
from megatron_hybrid.costs.stages import Stage, stages

__all__ = [
    "ActivationSettings",
    "CONTEXT_LENGTHS",
    "Cache",
    "CommunicationSettings",
    "Convention",
    "GROUPS",
    "Gpu",
    "Layout",
    "ModelParameters",
    "ModelStates",
    "Parameters",
    "RankMemory",
    "Recompute",
    "Sizes",
    "Stage",
    "StageParameters",
    "Storage",
    "Traffic",
    "activation_table",
    "attention_core_flops",
    "balance_pipeline",
    "bubble_fraction",
    "equal_count",
    "gpu",
    "gpu_of_device",
    "head_flops_per_token",
    "imbalance",
    "in_flight",
    "largest_rank",
    "layer_activation_bytes",
    "layer_cache",
    "layer_communication",
    "layer_flops_per_token",
    "layer_parameters",
    "match_flops",
    "match_parameters",
    "model_cache",
    "model_parameters",
    "mtp_flops_per_token",
    "pipeline_bubble",
    "pipeline_time",
    "rank_memory",
    "segment_work",
    "sizes_of",
    "ssd_scan_flops",
    "ssm_core_flops",
    "stage_activation_bytes",
    "stage_parameters",
    "stage_work",
    "stages",
    "step_communication",
    "training_flops",
    "training_flops_per_token",
]
