"""What a patch, or a function that knows upstream, relies on in the source of megatron-core 0.19.2.

Read as text, so that the check runs before any of it is replaced, and takes no import of Megatron.
"""

import ast
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

UPSTREAM = Path(str(metadata.distribution("megatron-core").locate_file("megatron")))
VERSION = "0.19.2"

ALLOCATION = "core/models/hybrid/hybrid_layer_allocation.py"
MTP = "core/transformer/multi_token_prediction.py"
MIXER = "core/ssm/mamba_mixer.py"
DELTA = "core/ssm/gated_delta_net"
DISPATCHER = "core/transformer/moe/token_dispatcher.py"
ROUTER = "core/transformer/moe/router.py"
ROUTER_LOG = "core/transformer/moe/moe_logging.py"
LANGUAGE = "core/models/common/language_module/language_module.py"
LINEARS = "core/tensor_parallel/layers.py"
MAPPINGS = "core/tensor_parallel/mappings.py"
ADAM = "core/optimizer/distrib_optimizer.py"
OPTIMIZER = "core/optimizer/optimizer.py"
RERUN = "core/rerun_state_machine.py"
TRAINING = "training/training.py"
ELASTIC = "../torch/distributed/elastic"
DCP = "../torch/distributed/checkpoint"
AGENT = f"{ELASTIC}/agent/server/api.py"
LOCAL_AGENT = f"{ELASTIC}/agent/server/local_elastic_agent.py"
ASYNC = "core/dist_checkpointing/strategies/async_utils.py"
PROCESSES = f"{ELASTIC}/multiprocessing/api.py"


@dataclass(frozen=True)
class Contract:
    """One place upstream that a patch, or a function of the package, relies on."""

    patch: str
    """Of the patch (:attr:`megatron_hybrid.patches.patching.Patch.contract`), or of the function."""
    file: str
    name: str = ""
    """Qualified name of a function or class in the file; empty for the whole file."""
    arguments: str | None = None
    """Names of the parameters, in order."""
    holds: tuple[str, ...] = ()
    """Code that stands there, whatever its line breaks and comments."""
    lacks: tuple[str, ...] = ()


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((UPSTREAM / file).read_text())


def node(file: str, name: str) -> ast.AST:
    """The syntax tree of a function, a class or (for an empty name) a file.

    Raises:
        LookupError: There is none of this name.
    """
    found: ast.AST = _tree(file)
    for part in filter(None, name.split(".")):
        parts = [n for n in ast.walk(found) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        if not parts:
            raise LookupError(f"megatron/{file} has no {name}")
        found = parts[0]
    return found
