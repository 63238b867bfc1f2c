"""What a pattern costs: the only place that counts. Imports neither torch nor Megatron.

In the order of its flow; each file imports those above it only:

========================  ==========================================================================
``sizes``                 the sizes of a model, from flags; the sizes of one rank's share of a layer
``parameters``            parameters of layers and models
``flops``                 training FLOPs, in two conventions
``layout``                how a model is spread over ranks: groups, pipeline stages and what they hold
``balance``               pipeline stages of equal work
``hardware``              GPUs: dense peaks, memory, bandwidths, and where they are stated
========================  ==========================================================================
"""

from megatron_hybrid.costs.balance import balance_pipeline, equal_count, imbalance, segment_work, stage_work
from megatron_hybrid.costs.flops import (
    Convention,
    attention_core_flops,
    delta_core_flops,
    head_flops_per_token,
    layer_flops_per_token,
    mtp_flops_per_token,
    ssm_core_flops,
    training_flops,
    training_flops_per_token,
)
from megatron_hybrid.costs.hardware import Gpu, gpu, gpu_of_device
from megatron_hybrid.costs.layout import Layout, Stage, stages
from megatron_hybrid.costs.parameters import ModelParameters, Parameters, layer_parameters, model_parameters
from megatron_hybrid.costs.sizes import Sizes

__all__ = [
    "Convention",
    "Gpu",
    "Layout",
    "ModelParameters",
    "Parameters",
    "Sizes",
    "Stage",
    "attention_core_flops",
    "balance_pipeline",
    "delta_core_flops",
    "equal_count",
    "gpu",
    "gpu_of_device",
    "imbalance",
    "layer_flops_per_token",
    "head_flops_per_token",
    "layer_parameters",
    "model_parameters",
    "mtp_flops_per_token",
    "segment_work",
    "ssm_core_flops",
    "stage_work",
    "stages",
    "training_flops",
    "training_flops_per_token",
]
