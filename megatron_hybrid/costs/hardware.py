"""GPUs: dense peaks, memory and bandwidths, each with its source. Imports neither torch nor Megatron.

NVIDIA's data sheets state most tensor-core figures "with sparsity", which training does not have: the peaks here are
half of those, rounded down to a TFLOP/s. A data sheet's NVLink figure adds up both directions: here is one of them.

Networks between nodes differ from cluster to cluster: none is listed, it has to be given.
"""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp16", "fp8", "tf32", "fp32"]

RESERVE = 0.1
"""Of a GPU's memory: the CUDA context, buffers of collectives, workspaces, and the allocator's fragments."""
MICRO_BATCHES = (1, 2, 4, 8)
"""Samples of a micro-batch that plans and recipes choose from."""

_T, _G = 1e12, 1e9
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU. Peaks in FLOP/s, memory in bytes, bandwidths in bytes per second."""

    name: str
    """As :func:`gpu` takes it."""
    title: str
    """For people."""
    peaks: dict[str, float]
    """Precision to dense peak: tensor cores, but for fp32. What the GPU lacks is absent."""
    memory: float
    """As the vendor states it, a GB taken as 10^9 bytes. All GPUs listed have somewhat more."""
    usable_memory: float | None
    """What CUDA reports as total, of which the CUDA context and libraries take up to about a GiB; None: not known
    here. It differs by some tenths of a percent between drivers."""
    bandwidth: float
    """Of its memory."""
    nvlink: float | None
    """Of all NVLinks of a GPU together, in one direction; None: depends on the machine."""
    nvlink_gpus: int
    """GPUs that are joined at that bandwidth: those of a board, or under a bridge; 1: depends on the machine."""
    source: str
    devices: tuple[str, ...]
    """Names by which ``torch.cuda.get_device_name()`` knows it."""

    @property
    def capacity(self) -> float:
        """Bytes to plan with: what CUDA reports where that is known, else what the vendor states."""
        return self.usable_memory or self.memory

    def peak(self, precision: Precision) -> float:
        """Dense peak in FLOP/s.

        Raises:
            ValueError: The GPU has no such arithmetic, or there is no such precision.
        """
        if precision not in self.peaks:
            raise ValueError(f"{self.title} has no {precision} peak; it has {', '.join(self.peaks)}")
        return self.peaks[precision]


def _peaks(bf16: float, tf32: float, fp32: float, fp8: float | None = None) -> dict[str, float]:
    """Peaks from TFLOP/s. fp16 has that of bf16 on all GPUs listed."""
    found = {"bf16": bf16 * _T, "fp16": bf16 * _T, "tf32": tf32 * _T, "fp32": fp32 * _T}
    return found if fp8 is None else {**found, "fp8": fp8 * _T}


_A100 = _peaks(312, 156, 19.5)
_A100_SHEET = (
    "NVIDIA A100 Tensor Core GPU data sheet (nvidia-1758950-r4), https://www.nvidia.com/content/dam/en-zz/Solutions/"
    "Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_A100_SHEET_40 = (
    "NVIDIA A100 Tensor Core GPU architecture white paper, https://images.nvidia.com/aem-dam/en-zz/Solutions/"
    "data-center/nvidia-ampere-architecture-whitepaper.pdf"
)
# With sparsity: SXM 1,979, 989, 3,958; PCIe 1,513, 756, 3,026; NVL 1,671, 835, 3,341
_HOPPER_SXM = _peaks(989, 494, 67, 1979)
_HOPPER_PCIE = _peaks(756, 378, 51, 1513)
_HOPPER_NVL = _peaks(835, 417, 60, 1670)
_H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet, https://www.nvidia.com/en-us/data-center/h100/"
_H200_SHEET = "NVIDIA H200 Tensor Core GPU data sheet, https://www.nvidia.com/en-us/data-center/h200/"
_GH200_SHEET = (
    "NVIDIA GH200 Grace Hopper Superchip data sheet, https://www.nvidia.com/en-us/data-center/grace-hopper-superchip/"
)

GPUS = (
    Gpu(
        name="a100-40gb",
        title="A100 SXM 40GB",
        peaks=_A100,
        memory=40 * _G,
        usable_memory=42_405_855_232,  # deviceQuery
        bandwidth=1555 * _G,
        nvlink=300 * _G,
        nvlink_gpus=8,
        source=_A100_SHEET_40,
        devices=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
    ),
    Gpu(
        name="a100-80gb",
        title="A100 SXM 80GB",
        peaks=_A100,
        memory=80 * _G,
        usable_memory=85_198_045_184,  # deviceQuery
        bandwidth=2039 * _G,
        nvlink=300 * _G,
        nvlink_gpus=8,
        source=_A100_SHEET,
        devices=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    ),
    Gpu(
        name="a100-pcie-40gb",
        title="A100 PCIe 40GB",
        peaks=_A100,
        memory=40 * _G,
        usable_memory=None,
        bandwidth=1555 * _G,
        nvlink=300 * _G,
        nvlink_gpus=2,
        source=_A100_SHEET_40,
        devices=("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
    ),
    Gpu(
        name="a100-pcie-80gb",
        title="A100 PCIe 80GB",
        peaks=_A100,
        memory=80 * _G,
        usable_memory=None,
        bandwidth=1935 * _G,
        nvlink=300 * _G,
        nvlink_gpus=2,
        source=_A100_SHEET,
        devices=("NVIDIA A100 80GB PCIe",),
    ),
    Gpu(
        name="h100-80gb",
        title="H100 SXM",
        peaks=_HOPPER_SXM,
        memory=80 * _G,
        usable_memory=81_082 * _MIB,  # torch 2.0
        bandwidth=3350 * _G,
        nvlink=450 * _G,
        nvlink_gpus=8,
        source=_H100_SHEET,
        devices=("NVIDIA H100 80GB HBM3",),
    ),
    Gpu(
        name="h100-pcie",
        title="H100 PCIe",
        peaks=_HOPPER_PCIE,
        memory=80 * _G,
        usable_memory=81_008 * _MIB,  # torch 2.0
        bandwidth=2000 * _G,
        nvlink=300 * _G,
        nvlink_gpus=2,
        source=_H100_SHEET,
        devices=("NVIDIA H100 PCIe",),
    ),
    Gpu(
        name="h100-nvl",
        title="H100 NVL",
        peaks=_HOPPER_NVL,
        memory=94 * _G,
        usable_memory=None,
        bandwidth=3900 * _G,
        nvlink=300 * _G,
        nvlink_gpus=2,
        source=_H100_SHEET,
        devices=("NVIDIA H100 NVL",),
    ),
    Gpu(
        name="h200",
        title="H200 SXM",
        peaks=_HOPPER_SXM,
        memory=141 * _G,
        usable_memory=143_156 * _MIB,  # torch
        bandwidth=4800 * _G,
        nvlink=450 * _G,
        nvlink_gpus=8,
        source=_H200_SHEET,
        devices=("NVIDIA H200",),
    ),
    Gpu(
        name="b200",
        title="B200",
        # the brief states dense figures for a GPU of 1,000 W
        peaks=_peaks(2250, 1100, 80, 4500),
        memory=180 * _G,
        usable_memory=178.35 * _GIB,  # deviceQuery, in pytorch/ao's pull request 4002
        bandwidth=8000 * _G,
        nvlink=900 * _G,
        nvlink_gpus=8,
        source="NVIDIA Blackwell architecture technical brief, table of HGX B200, "
        "https://resources.nvidia.com/en-us-blackwell-architecture; memory: DGX B200, "
        "https://www.nvidia.com/en-us/data-center/dgx-b200/",
        devices=("NVIDIA B200",),
    ),
    Gpu(
        name="gh200-96gb",
        title="GH200 96GB",
        peaks=_HOPPER_SXM,
        memory=96 * _G,
        usable_memory=94.88 * _GIB,  # torch, in Lightning-AI/litgpt's issue 1892
        bandwidth=4000 * _G,
        nvlink=None,
        nvlink_gpus=1,
        source=_GH200_SHEET,
        devices=("NVIDIA GH200 480GB",),  # the name counts the CPU's memory
    ),
)
"""All GPUs that are known."""

ALIASES = {
    "a100": "a100-80gb",
    "a100-sxm": "a100-80gb",
    "a100-sxm-80gb": "a100-80gb",
    "a100-sxm-40gb": "a100-40gb",
    "a100-pcie": "a100-pcie-80gb",
    "h100": "h100-80gb",
    "h100-sxm": "h100-80gb",
    "h100-sxm-80gb": "h100-80gb",
    "h100-pcie-80gb": "h100-pcie",
    "h100-nvl-94gb": "h100-nvl",
    "h200-141gb": "h200",
    "h200-sxm": "h200",
    "b200-180gb": "b200",
    "gh200": "gh200-96gb",
}
"""Other names of GPUs; a bare model means its SXM board, and the larger one."""


def gpu(name: str) -> Gpu:
    """The GPU of a name or an alias, in any case.

    Raises:
        ValueError: The GPU is not known; its figures are never guessed.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    wanted = ALIASES.get(wanted, wanted)
    for known in GPUS:
        if known.name == wanted:
            return known
    raise ValueError(
        f"{name!r} is not a known GPU; known are {', '.join(g.name for g in GPUS)}. Those of another can be given as "
        "numbers, such as its dense peak with --peak-tflops."
    )


def gpu_of_device(device: str) -> Gpu | None:
    """The GPU that ``torch.cuda.get_device_name()`` names, or None.

    Names must agree as a whole: a slice of a GPU ("NVIDIA H100 80GB HBM3 MIG 1g.10gb") and variants for one customer
    or country ("NVIDIA A100-SXM-64GB", "NVIDIA H800") have other peaks.
    """
    return next((known for known in GPUS if device.strip() in known.devices), None)
