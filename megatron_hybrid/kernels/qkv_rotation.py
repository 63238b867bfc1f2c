"""Queries, keys and values of attention out of the columns of one projection, with RoPE.

On CUDA one kernel each way (``kernels/triton/rotary.py``), elsewhere torch's operations.

Shape letters: s tokens, b samples, n query heads, g key heads, gv value heads, d head size of Q and K, dv head size of
V, r channels of a head that RoPE turns, w columns of the projection.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .head_columns import HeadColumns, Turns
from .triton_use import can_run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of a projection that the kernel takes."""


_turns: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Angles to their turns, which all micro-batches share."""


def turns_of(angles: Tensor, interleaved: bool = False, factor: float = 1.0) -> Turns:
    """Cosines and sines of Megatron's angles, kept for as long as the tensor of angles lives.

    Args:
        angles: [s, 1, 1, r] with r even: an angle for each channel, the same for both of a pair; never changed.
        interleaved: Which channels are a pair, see :class:`Turns`.
        factor: Of the rotated channels (YaRN's concentration factor).
    """
    known = _turns.setdefault(angles, {})
    rule = interleaved, factor
    if rule not in known:
        with torch.inference_mode(False), torch.no_grad():  # a validation may come first, and training save the table
            flat = angles.flatten(1).float()  # [s, r]
            of_pairs = flat[:, ::2] if interleaved else flat[:, : flat.shape[1] // 2]  # [s, r/2]
            known[rule] = Turns(factor * torch.stack([of_pairs.cos(), of_pairs.sin()], 1), interleaved)
    return known[rule]


def takes(x: Tensor) -> bool:
    """Whether the kernel takes a projection."""
    return can_run(x) and x.dtype in DTYPES


def split_and_rotate(
    x: Tensor, heads: HeadColumns, turns: Turns | None, copy_values: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of a projection, those of Q and K turned by RoPE in fp32; differentiable in x.

    The backward pass needs nothing of x. Where x is columns that :func:`megatron_hybrid.kernels.columns.split_columns`
    made, the kernel writes their gradient straight into that of the whole tensor.

    Args:
        x: [s, b, w].
        heads: Where they stand in the w columns.
        turns: For the s tokens; None: RoPE turns nothing.
        copy_values: v is a tensor of its own, so that nothing keeps x; else it is a view of x, whose value heads must
            be one in each group, or all in one group.

    Returns:
        q [s, b, n, d] and k [s, b, g, d], contiguous; v [s, b, gv, dv].

    Raises:
        ValueError: The columns or positions are not those that heads and turns have, or values have no such view.
    """
    if x.shape[-1] != heads.columns:
        raise ValueError(f"the projection has {x.shape[-1]} columns, and its heads {heads.columns}")
    if turns is not None and (turns.table.shape[0] < x.shape[0] or 2 * turns.table.shape[2] > heads.width):
        positions, _, pairs = turns.table.shape
        raise ValueError(
            f"RoPE's table has {positions} positions and turns {2 * pairs} channels; there are {x.shape[0]} tokens "
            f"and {heads.width} channels a head"
        )
    if not copy_values and heads.groups > 1 and heads.values > 1:
        raise ValueError(f"{heads.groups} groups of {heads.values} value heads each have no view as heads: copy them")
    if not takes(x):
        return split_and_rotate_reference(x, heads, turns)
    from .triton.rotary import split_and_rotate as by_kernel

    return by_kernel(x, heads, turns, copy_values)


def split_and_rotate_reference(x: Tensor, heads: HeadColumns, turns: Turns | None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`split_and_rotate` in torch's operations; v is a view where it can be."""
    s, b, _ = x.shape
    grouped = x.view(s, b, heads.groups, heads.group_columns)
    widths = heads.queries * heads.width, heads.keys * heads.width, heads.values * heads.value_width
    q, k, v = (
        part.reshape(s, b, -1, width)
        for part, width in zip(grouped.split(widths, -1), (heads.width, heads.width, heads.value_width), strict=True)
    )
    return (q, k, v) if turns is None else (_rotate(q, turns), _rotate(k, turns), v)


def _rotate(x: Tensor, turns: Turns) -> Tensor:
    """[s, b, heads, d] with its first r channels turned."""
    cos, sin = turns.table[: len(x), None, None].unbind(3)  # [s, 1, 1, r/2]
    channels = 2 * cos.shape[-1]
    wide = x[..., :channels].to(torch.promote_types(x.dtype, torch.float32))
    if turns.interleaved:
        first, second = wide[..., ::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, -1)
    pair = first * cos - second * sin, second * cos + first * sin  # [s, b, heads, r/2]
    turned = torch.stack(pair, -1).flatten(-2) if turns.interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), x[..., channels:]], -1)
