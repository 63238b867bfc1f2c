"""Refusals of settings that a kind of cost does not know: no count at all rather than a wrong one."""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.accounting.sizes import setting
from megatron_hybrid.argv import flag_name


def refuse(args: Any, settings: Mapping[str, str], cost: str) -> None:
    """Refuses arguments in which one of the settings is on.

    Args:
        settings: Name of each, and what it means.
        cost: What is not counted of it.

    Raises:
        ValueError: One is neither absent, off, nor ``none``.
    """
    for name, reason in settings.items():
        value = setting(args, name)
        if value and value != "none":
            raise ValueError(
                f"{flag_name(name)} means {reason}, whose {cost} is not counted here. Drop it from the plan."
            )


def refuse_dispatchers(args: Any) -> None:
    """Refuses to count experts whose tokens come to them in another way than by all-to-alls.

    Raises:
        ValueError: There are experts, and another dispatcher.
    """
    dispatcher = setting(args, "moe_token_dispatcher_type", "alltoall")
    if setting(args, "num_experts") and dispatcher != "alltoall":
        raise ValueError(
            f"--moe-token-dispatcher-type {dispatcher}: its memory and its communication are not counted here. Use "
            "alltoall."
        )
