"""Layers whose norms and fusion are our kernels, or torch's operations. By Triton's interpreter."""

from typing import Any


def layer(ours: bool, **case: Any) -> tuple[dict[str, Any], list[str]]:
    """:func:`tests.support.single.layer`, and which kernels ran, in order.

    ``columns`` stands for a gradient that its kernel wrote into that of a projection.
    """
    from unittest.mock import patch

    from megatron_hybrid.kernels import branches, columns, norms
    from megatron_hybrid.kernels.triton import branch_fusion, rms_norm
    from tests.support import single, triton_interpreter

    assert triton_interpreter.interpreted()
    if not hasattr(layer, "mended"):
        triton_interpreter.install()
        layer.mended = True  # type: ignore[attr-defined]
    ran: list[str] = []

    def counted(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def run(*args: Any) -> Any:
            ran.append(name)
            return function(*args)

        return patch.object(module, name, run)

    with (
        patch.object(norms, "can_run", lambda x: ours),
        patch.object(branches, "can_run", lambda x: ours),
        counted(rms_norm, "rms_norm_forward"),
        counted(branch_fusion, "add_forward"),
        counted(columns.GradientRows, "columns"),
    ):
        return single.layer(**case), ran
