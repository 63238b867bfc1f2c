"""Triton's interpreter, which runs kernels on CPU tensors, with what its release 3.6 gets wrong mended.

A file of tests says once::

    pytestmark = pytest.mark.triton_interpreter

and calls kernels on CPU tensors of small shapes: a program of the grid takes milliseconds. Triton decides when it is
imported whether kernels are interpreted, so that such tests run in a process of their own
(:mod:`tests.support.interpreted_tests`). To debug one, run that process yourself:
``TRITON_INTERPRET=1 pytest --pdb tests/kernels/triton/test_NAME.py``.

What is mended:

- A scalar is an array of one entry, which numpy takes for an integer no more from 2.4 on: ``range(n)`` fails.
- bf16 values are held as 16-bit integers, and ``tl.dot``, arithmetic, comparisons and reductions compute with these
  integers. Here they compute in fp32 and round, as a GPU does.
- fp32 to bf16 cuts bits off instead of rounding to nearest even.

What the interpreter does not tell: races, shared memory, alignment, and anything about layouts. It takes ``x = 3`` in a
kernel for a tensor: write ``x: tl.constexpr = 3``.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

VARIABLE = "TRITON_INTERPRET"


def interpreted() -> bool:
    """Whether this process was started to interpret kernels."""
    return os.environ.get(VARIABLE) == "1"


def to_float(bits: np.ndarray) -> np.ndarray:
    """bf16 in 16-bit integers to fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 in 16-bit integers, to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Mends the interpreter of this process, of which :func:`interpreted` must be true."""
    from triton.runtime import interpreter

    _compute_bf16(interpreter)
    _convert_bf16(interpreter)
    _reduce_bf16(interpreter)
    _take_scalars_for_integers(interpreter)


def _compute_bf16(interpreter: Any) -> None:
    import triton.language as tl

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def is_bf16(operand: Any) -> bool:
        return isinstance(operand, handle) and operand.dtype.scalar == tl.bfloat16

    def in_fp32(original: Callable) -> Callable:
        """Of an operation whose result has the type of its last operand, or is a comparison's."""

        def method(self: Any, *operands: Any) -> Any:
            result = original(self, *(handle(to_float(o.data), tl.float32) if is_bf16(o) else o for o in operands))
            narrow = is_bf16([o for o in operands if isinstance(o, handle)][-1]) and result.data.dtype == np.float32
            return handle(to_bits(result.data), tl.bfloat16) if narrow else result

        return method

    for name in ("binary_op", "unary_op", "create_fma", "create_dot", "create_clampf"):
        setattr(builder, name, in_fp32(getattr(builder, name)))


def _convert_bf16(interpreter: Any) -> None:
    import triton.language as tl

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def rounding(original: Callable) -> Callable:
        def method(self: Any, source: Any, target: Any, *mode: Any) -> Any:
            kinds = source.dtype.scalar, target.scalar
            if tl.bfloat16 not in kinds or any(kind.is_fp8() for kind in kinds):
                return original(self, source, target, *mode)
            values = to_float(source.data) if kinds[0] == tl.bfloat16 else source.data
            if kinds[1] == tl.bfloat16:
                return handle(to_bits(values.astype(np.float32)), kinds[1])
            return handle(values.astype(interpreter._get_np_dtype(target)), kinds[1])

        return method

    builder.cast_impl = rounding(builder.cast_impl)
    builder.create_fp_to_fp = rounding(builder.create_fp_to_fp)


def _reduce_bf16(interpreter: Any) -> None:
    """Reductions and scans: each gets a tuple of tensors and returns as many, or fewer."""
    import triton.language as tl

    def in_fp32(original: Callable) -> Callable:
        def apply_impl(self: Any, tensors: tuple) -> Any:
            if all(t.dtype != tl.bfloat16 for t in tensors):
                return original(self, tensors)
            wide = tuple(
                self.to_tensor(to_float(t.handle.data), tl.float32) if t.dtype == tl.bfloat16 else t for t in tensors
            )
            found = original(self, wide)
            several = found if isinstance(found, list | tuple) else (found,)
            return tuple(
                self.to_tensor(to_bits(f.handle.data), tl.bfloat16) if f.dtype == tl.float32 else f for f in several
            )

        return apply_impl

    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        kind.apply_impl = in_fp32(kind.apply_impl)


def _take_scalars_for_integers(interpreter: Any) -> None:
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
