"""Kernels compiled for Hopper on a machine without a GPU: what they take of it."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.machine_code import overwritten

HOPPER = GPUTarget("cuda", 90, 32)


class Resources(NamedTuple):
    """Of one compiled kernel."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that registers did not hold."""
    shared: int
    """Bytes of shared memory of a program."""
    serialized: bool
    """Products wait for one another where they should not: the assembler says so."""
    overwritten: list[str]
    """Products whose left side a loop overwrites: the assembler's mistake (:mod:`tests.support.machine_code`)."""
    ptx: str


def compiled(kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> Resources:
    """Compiles a function of @triton.jit for sm_90a, as a launch would with arguments of these kinds.

    Args:
        kernel: The function, in a process that does not interpret.
        arguments: Each by its name: the type of a pointer ("*bf16") or of a tensor descriptor ("tensordesc<...>"), None
            for one that is absent, an example of a number, or a constant. Pointers, and numbers that 16 divides unless
            the kernel is not made for their values, are taken to be multiples of 16.
        options: num_warps, num_stages, maxnreg.
    """
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        typed = isinstance(value, str)
        signature[parameter.name] = value if typed else "fp32" if isinstance(value, float) else "i32"
        if value[0] == "*" if typed else value % 16 == 0 and not parameter.do_not_specialize:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=HOPPER, options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "ptx"), Path(folder, "cubin")
        ptx.write_text(made.asm["ptx"])
        said = _run(triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", ptx, "-o", cubin).stderr
        code = _run(triton.knobs.nvidia.nvdisasm.path, cubin).stdout
    registers, spilled = (int(re.findall(p, said)[-1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return Resources(registers, spilled, made.metadata.shared, "serialized" in said, overwritten(code), made.asm["ptx"])


def _run(*words: Any) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, check=True)
