"""Environment variables that ranks get, unless the user has set them."""

import ipaddress
from collections.abc import Mapping


def defaults(env: Mapping[str, str], address: str, processes: int, cpus: int | None, device: str) -> dict[str, str]:
    """The variables that ``env`` lacks.

    Args:
        address: Where the nodes meet.
        processes: Ranks on a node.
        cpus: Cores of a node, if known.

    Left to the user, since they depend on the cluster: NCCL_SOCKET_IFNAME (NCCL or Gloo starts over an interface that
    the nodes do not share: name the right one, such as eth0; GLOO_SOCKET_IFNAME likewise) and NCCL_IB_HCA (NCCL takes
    adapters that belong to storage). Left to each rank, which knows its layout: CUDA_DEVICE_MAX_CONNECTIONS
    (cli/connections.py).
    """
    wanted = {
        "PYTHONUNBUFFERED": "1",  # the last lines of a killed rank are in its log
        "NCCL_DEBUG": "WARN",  # INFO names the networks that NCCL chose: read it once
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a failed or hanging collective ends its process
        # torch would start a thread per core in every rank; on GPUs the host computes little
        "OMP_NUM_THREADS": str(max(1, (cpus or 1) // processes)) if device == "cpu" else "1",
    }
    if _is_loopback(address):  # all "nodes" are this machine, and its name may lead Gloo to another interface
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in wanted.items() if name not in env}


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
