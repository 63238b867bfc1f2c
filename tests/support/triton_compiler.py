"""Kernels compiled for Hopper on a machine without a GPU: what they take of it."""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)


class Resources(NamedTuple):
    """Of one compiled kernel."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that registers did not hold."""
    shared: int
    """Bytes of shared memory of a program."""
    ptx: str


def compiled(kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> Resources:
    """Compiles a function of @triton.jit for sm_90a, as a launch would with arguments of these kinds.

    Args:
        kernel: The function, in a process that does not interpret.
        arguments: Each by its name: a pointer's type ("*bf16"), an example of a number, or a constant. Pointers, and
            numbers that 16 divides, are taken to be multiples of 16.
        options: num_warps, num_stages, maxnreg.
    """
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        pointer = isinstance(value, str)
        signature[parameter.name] = value if pointer else "fp32" if isinstance(value, float) else "i32"
        if pointer or value % 16 == 0:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(made.asm["ptx"])
        file.flush()
        words = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.findall(p, said)[-1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return Resources(registers, spilled, made.metadata.shared, made.asm["ptx"])
