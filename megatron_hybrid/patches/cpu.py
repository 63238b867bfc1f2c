"""The CPU engine: Megatron's CUDA calls, answered by the CPU.

Megatron-Core asks ``torch.cuda`` for its device, its streams and its random state throughout. After
:func:`install` those calls are answered for the CPU, tensors that are asked for on "cuda" appear on the CPU,
and process groups use Gloo: the unmodified ``megatron.training.pretrain()`` then trains with its real
parallel layouts and no GPU. It is for debugging, tests and teaching; it imitates results, not speed.

Every name that is replaced stands in :data:`REPLACED` with its reason.
"""

import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_hybrid.patches import patching
from megatron_hybrid.patches.patching import Patch, Table, Value

NAME = "CPU engine"
_CPU = torch.device("cpu")

# Megatron seeds the host's and the device's random streams apart, and forks, saves and restores them apart.
# Every random operation here runs on torch's default CPU generator, which therefore plays the device's. The
# host's draws (in practice: the seed that each DataLoader iterator takes) come from this generator instead, so
# that creating an iterator cannot shift the dropout or the initialisation of a run.
_host_generator = torch.Generator()


class Event:
    """``torch.cuda.Event`` for a device whose work is done when the call returns."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between the two records."""
        return (end._time - self._time) * 1e3


class Stream:
    """``torch.cuda.Stream``, also as a context manager; all work is in order."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0):
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _DeviceProperties:
    name = "cpu"
    major, minor = 9, 0
    multi_processor_count = 1

    @property
    def total_memory(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _DefaultGenerators:
    """``torch.cuda.default_generators``: one device, whatever it is indexed with."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


class _CudaToCpu(TorchFunctionMode):
    """Redirects every tensor that is asked for on "cuda" to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:  # "cuda", 0 are two arguments there
            made = func(*args, **(kwargs or {}))
            return _CPU if _is_cuda(made) else made
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):  # core/models/common/embeddings/rope_utils.py:59; pinning needs a driver
                kwargs = {**kwargs, "pin_memory": False}
        for arg in args:
            if isinstance(arg, (str, torch.device)) and _is_cuda(arg):
                args = tuple(_CPU if isinstance(a, (str, torch.device)) and _is_cuda(a) else a for a in args)
                break
        return func(*args, **kwargs) if kwargs else func(*args)


def _is_cuda(device: Any) -> bool:
    """Whether ``device``, as torch's functions take it, is "cuda" with or without an index."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and (device == "cuda" or device.startswith("cuda:"))


_the_stream = Stream()
_tensor_type = torch.Tensor.type
_manual_seed = torch.manual_seed
_dataloader_init = torch.utils.data.DataLoader.__init__


def _type_with_cuda_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    result = _tensor_type(self, *args, **kwargs)
    # under the function mode below torch looks the method up again and comes here twice
    if isinstance(result, str) and not args and not kwargs and "cuda" not in result:
        return result.replace("torch.", "torch.cuda.", 1)
    return result


def _seed_host_and_device(seed: int) -> torch.Generator:
    _host_generator.manual_seed(int(seed))
    return _manual_seed(seed)


def _dataloader_on_host_generator(self: Any, *args: Any, **kwargs: Any) -> None:
    if kwargs.get("generator") is None:
        kwargs["generator"] = _host_generator
    _dataloader_init(self, *args, **kwargs)


def _seed_device(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _get_device_state(device: Any = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_device_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _itself(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


_NO_WORK = "nothing to do: CPU work is finished when the call returns"
_NO_MEMORY = "the CPU has no caching allocator to ask; Megatron logs 0"

# (owner, name, replacement, reason), in the order in which they are put in place
REPLACED: list[tuple[Any, str, Any, str]] = [
    (torch.cuda, "is_available", _returns(True), "Megatron asserts that there is CUDA"),
    (torch.cuda, "is_initialized", _returns(True), "torch.cuda._lazy_call would queue RNG calls for ever"),
    (torch.cuda, "_lazy_init", _returns(None), "there is no driver to start"),
    (torch.cuda, "init", _returns(None), "there is no driver to start"),
    (torch.cuda, "device_count", _returns(1), "each process owns one device: the CPU"),
    (torch.cuda, "current_device", _returns(_CPU), "answers device=torch.cuda.current_device()"),
    (torch.cuda, "set_device", _returns(None), "there is one device"),
    (torch.cuda, "get_device_name", _returns("cpu"), "asked for in logs"),
    (torch.cuda, "get_device_capability", _returns((9, 0)), "asked for in argument checks"),
    (torch.cuda, "get_device_properties", _returns(_DeviceProperties()), "asked for in checks and logs"),
    (torch.cuda, "is_current_stream_capturing", _returns(False), "CUDA graphs do not exist here"),
    (torch.cuda, "Stream", Stream, "communication and offloading streams"),
    (torch.cuda, "Event", Event, "timers"),
    (torch.cuda, "current_stream", _returns(_the_stream), "there is one order of execution"),
    (torch.cuda, "default_stream", _returns(_the_stream), "there is one order of execution"),
    (torch.cuda, "stream", _returns(_the_stream), "there is one order of execution"),
    (torch.cuda, "set_stream", _returns(None), "there is one order of execution"),
    (torch.cuda, "synchronize", _returns(None), _NO_WORK),
    (torch.cuda, "empty_cache", _returns(None), _NO_MEMORY),
    (torch.cuda, "memory_allocated", _returns(0), _NO_MEMORY),
    (torch.cuda, "max_memory_allocated", _returns(0), _NO_MEMORY),
    (torch.cuda, "memory_reserved", _returns(0), _NO_MEMORY),
    (torch.cuda, "max_memory_reserved", _returns(0), _NO_MEMORY),
    (torch.cuda, "memory_stats", _returns(defaultdict(int)), _NO_MEMORY),
    (torch.cuda, "reset_peak_memory_stats", _returns(None), _NO_MEMORY),
    (torch.cuda, "default_generators", _DefaultGenerators(), "the device's random state is torch's default"),
    (torch.cuda, "manual_seed", _seed_device, "seeds the device's stream alone"),
    (torch.cuda, "manual_seed_all", _seed_device, "seeds the device's stream alone"),
    (torch.cuda, "get_rng_state", _get_device_state, "the device's stream"),
    (torch.cuda, "set_rng_state", _set_device_state, "the device's stream"),
    (torch.cuda.random, "get_rng_state", _get_device_state, "called by core/tensor_parallel/random.py"),
    (torch.cuda.random, "set_rng_state", _set_device_state, "the device's stream"),
    (torch, "manual_seed", _seed_host_and_device, "torch seeds the host and all devices"),
    (torch.random, "manual_seed", _seed_host_and_device, "torch seeds the host and all devices"),
    (torch, "get_rng_state", _host_generator.get_state, "the host's stream is its own"),
    (torch, "set_rng_state", _host_generator.set_state, "the host's stream is its own"),
    (torch.random, "get_rng_state", _host_generator.get_state, "the host's stream is its own"),
    (torch.random, "set_rng_state", _host_generator.set_state, "the host's stream is its own"),
    (torch.utils.data.DataLoader, "__init__", _dataloader_on_host_generator, "iterators draw on the host"),
    (torch.Tensor, "cuda", _itself, "tensors are where they should be"),
    (torch.nn.Module, "cuda", _itself, "modules are where they should be"),
    (torch.Tensor, "pin_memory", _itself, "pinning needs a driver"),
    (torch.Tensor, "record_stream", _returns(None), "there is one order of execution"),
    (torch.Tensor, "type", _type_with_cuda_name, "core/optimizer sorts parameters by the name torch.cuda.*"),
    (torch.accelerator, "is_available", _returns(False), "the DataLoader would pin memory"),
]


TABLE = Table(NAME, tuple(Patch(owner, name, Value(new), reason) for owner, name, new, reason in REPLACED))


def is_active() -> bool:
    """Whether :func:`install` has run in this process."""
    return patching.is_installed(NAME)


def install() -> None:
    """Answers Megatron's CUDA calls with the CPU, in this process, for good. A second call does nothing.

    Call it before Megatron is imported: some of Megatron's modules copy names out of ``torch.cuda``.

    Raises:
        RuntimeError: CUDA is initialised in this process, so tensors may be on a GPU already.
    """
    if is_active():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "The CPU engine cannot be installed: CUDA is already initialised in this process. "
            "Install it before the first CUDA call, or run with --device cuda."
        )
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # training/arguments.py insists on it under TP and CP
    # torch.compile decorates Megatron's small fusions; compiling them on a CPU costs minutes and gains nothing.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    patching.install(TABLE)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    _CudaToCpu().__enter__()
