"""What a pattern costs: the only place that counts. Imports neither torch nor Megatron.

In the order of its flow; each file imports those above it only:

========================  ==========================================================================
``sizes``                 the sizes of a model, from flags; the sizes of one rank's share of a layer
``refusals``              settings that no count knows are refused
``parameters``            parameters of layers and models
``flops``                 training FLOPs, in two conventions
``caches``                what is remembered of a context in generation: keys and values, states
``match``                 blocks for equal parameters, tokens for equal FLOPs
``layout``                how a model is spread over ranks: groups, pipeline stages and what they hold
``storage``               bytes of a parameter, its gradient and its optimizer state, from flags
``buffers``               Megatron's gradient buffers: padding, buckets, shards of the distributed optimizer
``memory``                parameters, gradients and optimizer state of each rank, in bytes
``balance``               pipeline stages of equal work
``hardware``              GPUs: dense peaks, memory, bandwidths, and where they are stated
``schedule``              the pipeline's schedule: micro-batches in flight, the bubble, a step's time
``activation_settings``   precision, implementation and recomputation, from flags
``saved_tensors``         what each layer keeps for its backward pass: a table of tensors
``activations``           bytes of it: of a layer, a micro-batch, and a stage at its peak
``collectives``           what a rank sends for a layer and a micro-batch, by group of ranks
``communication``         what a rank sends in a training step
========================  ==========================================================================
"""

from megatron_hybrid.costs.activation_settings import ActivationSettings, Recompute
from megatron_hybrid.costs.activations import activation_table, layer_activation_bytes, stage_activation_bytes
from megatron_hybrid.costs.balance import balance_pipeline, equal_count, imbalance, segment_work, stage_work
from megatron_hybrid.costs.caches import CONTEXT_LENGTHS, Cache, layer_cache, model_cache
from megatron_hybrid.costs.collectives import GROUPS, CommunicationSettings, Traffic, layer_communication
from megatron_hybrid.costs.communication import step_communication
from megatron_hybrid.costs.flops import (
    Convention,
    attention_core_flops,
    delta_core_flops,
    delta_scan_flops,
    head_flops_per_token,
    layer_flops_per_token,
    mtp_flops_per_token,
    ssd_scan_flops,
    ssm_core_flops,
    training_flops,
    training_flops_per_token,
)
from megatron_hybrid.costs.hardware import Gpu, gpu, gpu_of_device
from megatron_hybrid.costs.layout import Layout, Stage, stages
from megatron_hybrid.costs.match import match_flops, match_parameters
from megatron_hybrid.costs.memory import (
    ModelStates,
    RankMemory,
    StageParameters,
    largest_rank,
    rank_memory,
    stage_parameters,
)
from megatron_hybrid.costs.parameters import ModelParameters, Parameters, layer_parameters, model_parameters
from megatron_hybrid.costs.schedule import bubble_fraction, in_flight, pipeline_bubble, pipeline_time
from megatron_hybrid.costs.sizes import Sizes
from megatron_hybrid.costs.storage import Storage

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
    "delta_core_flops",
    "delta_scan_flops",
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
