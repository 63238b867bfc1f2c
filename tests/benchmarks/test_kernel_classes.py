"""Kernels by their names, as profiles of steps on an H200 have them, and the time in which none runs."""

import importlib
import pkgutil

import pytest

from megatron_hybrid.benchmarks.kernel_classes import (
    CLASSES,
    OTHER,
    Kernel,
    busy,
    by_class,
    by_name,
    class_of,
    own_names,
)
from megatron_hybrid.kernels import triton as triton_kernels

NAMES = {
    "matrix products": [
        "nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_NNT",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align2>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
    ],
    "scan": ["_chunk_scan_chunk_state_bwd_dx_kernel", "_state_passing_fwd_kernel", "_bmm_chunk_bwd_kernel"],
    "convolution": ["void causal_conv1d_channellast_bwd_kernel<Causal_conv1d_channellast_bwd_kernel_traits<128>>"],
    "8 bits": [
        "void transformer_engine::detail::cast_transpose_general_kernel<8ul, 8ul, __nv_bfloat16, __nv_fp8_e4m3>",
        "void transformer_engine::(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>",
        "void transformer_engine::(anonymous namespace)::block_scaled_1d_cast_transpose_kernel<true, float>",
    ],
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64",
        "cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>",
        "triton_tem_fused_flex_attention_backward_3",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>",
    ],
    "norms": [
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
        "void at::native::(anonymous namespace)::cuComputeGradInputRMSNorm<bf16>",
        "_layer_norm_bwd_kernel",
    ],
    "loss": ["liger_cross_entropy_kernel", "void (anonymous namespace)::cunn_LogSoftMaxForward<4>"],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor<float, (NormType)1>>",
    ],
    "communication": ["ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
    "elementwise and copies": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::reduce_kernel<512, 1, ReduceOp<float, at::native::MaxNanFunctor>>",
        "triton_poi_fused__to_copy_mul_silu_0",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int, 3>",
        "void at::native::index_elementwise_kernel<128, 4>",
    ],
    "experts": ["expert_permutation._place"],
    OTHER: ["some_kernel_of_the_future"],
}


@pytest.mark.parametrize(("label", "name"), [(label, name) for label, names in NAMES.items() for name in names])
def test_classes(label, name):
    assert class_of(name) == label


def test_every_class_has_a_name_here():
    assert set(NAMES) == {label for label, _ in CLASSES} | {OTHER}


def test_busy_counts_kernels_that_run_at_once_one_time():
    kernels = [
        Kernel("a", 100, 10),
        Kernel("b", 105, 10),
        Kernel("c", 106, 2),
        Kernel("d", 200, 5),
        Kernel("e", 115, 1),
    ]
    assert busy(kernels) == 16 + 5
    assert busy(reversed(kernels)) == busy(kernels) and busy([]) == 0


def test_sums_by_name_and_class():
    kernels = [Kernel("nvjet_a", 0, 2_000_000), Kernel("Memset", 5, 500_000), Kernel("nvjet_a", 9, 1_000_000)]
    rows = by_name(kernels)
    assert rows[0] == {"name": "nvjet_a", "class": "matrix products", "count": 2, "ms": 3.0}
    assert by_class(rows) == {"matrix products": 3.0, "elementwise and copies": 0.5}


def test_kernels_of_this_package_are_known_by_their_files():
    for file in pkgutil.iter_modules(triton_kernels.__path__):
        importlib.import_module(f"{triton_kernels.__name__}.{file.name}")
    names = own_names()
    assert names["states_kernel"] == "scan_walks.states_kernel" and "launch_options" not in names
    labels = {"causal_conv": "convolution", "scan": "scan", "window_attention": "attention", "cross_entropy": "loss"}
    labels |= {"expert_permutation": "experts", "router": "experts", "weighted_swiglu": "elementwise and copies"}
    for name in names.values():
        files, _, function = name.partition(".")
        of_each = {class_of(f"{file}.{function}") for file in files.split("/")}
        assert len(of_each) == 1, f"{name}: kernels of several classes have one name"
        for start, label in labels.items():
            if files.startswith(start):
                assert class_of(name) == label
