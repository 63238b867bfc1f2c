"""Upstream still has the code that patches and functions rely on. Its source is read, and not imported."""

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest

from megatron_hybrid.kernels import ssm_kernels
from megatron_hybrid.patches import (
    building,
    child_processes,
    experts,
    gloo,
    hooks,
    missing_packages,
    optimizer_state,
    parsing,
    routers,
    swiglu_kernels,
    unpickling,
)
from tests.patches.contract import VERSION, Contract, node
from tests.patches.contracts import CONTRACTS

PACKAGE = Path(__file__).parents[2] / "megatron_hybrid"


FILES = [
    *(
        p
        for room in ("patches", "checkpoint", "training")
        for p in PACKAGE.glob(f"{room}/*.py")
        if not p.stem.startswith("warm_start")
    ),
    *(PACKAGE / name for name in ("cli/arguments.py", "cli/connections.py", "errors.py", "launch/agent.py")),
]
"""Where upstream is read or patched."""


# Public functions that neither patch anything inside Megatron nor rely on what could change unseen there
NO_PATCH = {
    "prepare": "calls the others",
    "pad_buckets": "a step of save_optimizer_buckets_in_place",
    "has_module": "Python's own",
    "peak": "of torch's public interface",
    "peak_notes": "of torch's public interface",
    "peak_memory": "of torch's public interface",
    "short": "has none",
    "is_active": "of the CPU engine",
    "install": "of the mechanism",
    "uninstall": "of the mechanism",
    "uninstall_run": "of the mechanism",
    "is_installed": "of the mechanism",
    "replaced": "of the mechanism",
    "no_collection": "of Python's garbage collector",
    "install_hooks": "of the mechanism",
    "before_parsing": "calls the others",
    "building": "makes a table, whose rows have contracts",
    "mamba_kernels": "makes a table, whose rows have contracts",
    "accumulate_where_there_is_a_buffer": "a row of accumulate_in_products",
    "gradient_accumulation": "makes a table, whose rows have contracts",
    "extended_norm": "a row of use_torch_mamba_kernels",
    "pair_groups_of_other_schedules": "a row of load_optimizers_of_other_schedules",
    "record_in_place_of_all_layers": "a row of log_router_losses_of_all_layers",
    "count_routed_tokens": "a row of count_tokens_of_experts",
    "lacks_fused_adam": "of names that use_fused_adam_contract replaces",
    "guard_saves": "its hooks have contracts",
    "wrap_update": "called by watch_steps",
    "wrap_restore": "called by watch_steps",
    "load_pickle": "of Python's unpickler",
    "check_pickles": "of what admit_known_classes_only installs",
    "forward_step": "calls the model",
    "datasets": "of Megatron's public builder",
    "reads_data": "of Megatron's public parallel state",
    "train": "calls Megatron's public pretrain",
    "choose_device": "of torch's public interface",
    "choose_backend": "has none",
    "choose_ssm_kernels": "of the room kernels",
    "help_text": "calls add_hybrid_flags",
    "balance": "of flags, by the parser that parse() calls",
    "import_megatron_quietly": "an import",
    "set_single_process_defaults": "of torchrun's environment variables",
    "check_data": "of flags, which parse() would miss",
    "check_end_of_document": "of flags, by Megatron's public build_tokenizer",
    "check_tokenizer": "of flags, which parse() would miss",
    "check_provenance": "of flags and of files that we write",
    "check_checkpoint": "calls stored_common",
    "stored_arguments": "calls stored_common",
    "takes_weights_alone": "of flags",
    "check_model": "of stored flags",
    "computed_by": "of the registry",
    "check_schedule": "of what stored_common and schedule find",
    "agree_on_schedule": "called by load_optimizers_of_other_schedules",
    "split_config": "called by validate_on_whole_sets",
    "prefixes": "calls blends",
    "check_content": "of files, and of Megatron's public get_tokenizer",
    "check_data_content": "calls check_content and stored_arguments",
    "compare_tokenizer": "calls compare",
    "vocabulary": "of a tokenizer's files",
    "load_object": "of torch's public load",
    "load_index": "of numpy's public load",
    "check_optimizer_state": "of flags, which upstream would meet with the model built",
    "layers_of_experts": "of the pattern",
    "expert_loads": "of what routers finds",
    "open_checkpoint": "calls stored_arguments",
    "verified": "reads files",
    "check": "of flags that retention and background saves need",
    "agree": "of torch's public store",
    "among_ranks": "calls agree",
    "rendezvous_store": "of torch's public rendezvous",
    "fill": "of what stored_tensors finds",
    "upstream_errors_as_value_errors": "of Python's exceptions",
    "check_configs": "calls what train() calls",
    "command_line": "of sys.argv and of environment variables",
}


def test_the_patches_are_written_for_the_installed_version():
    assert metadata.version("megatron-core") == VERSION


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: f"{c.patch}-{c.name or c.file}")
def test_upstream_is_as_the_patch_expects(contract: Contract):
    found = node(contract.file, contract.name)
    if contract.arguments is not None:
        assert [a.arg for a in (*found.args.posonlyargs, *found.args.args)] == contract.arguments.split()
        assert not found.args.kwonlyargs
    code = ast.unparse(found)
    for text in contract.holds:
        assert text in code
    for text in contract.lacks:
        assert text not in code


def test_every_public_function_that_knows_upstream_has_a_contract():
    functions = {
        n.name
        for path in FILES
        for n in ast.parse(path.read_text()).body
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
    }
    answered = {contract.patch for contract in CONTRACTS}
    assert functions == (answered & functions) | set(NO_PATCH)
    assert not answered & set(NO_PATCH)


TABLES = [
    building.building(object, object),
    missing_packages.mamba_kernels(ssm_kernels("cpu")),
    missing_packages.GATED_DELTA_RULE,
    missing_packages.gradient_accumulation(apex=False),
    missing_packages.FUSED_ADAM,
    gloo.GLOO,
    routers.TABLE,
    experts.TABLE,
    swiglu_kernels.TABLE,
    optimizer_state.TABLE,
    unpickling.TABLE,
    parsing.VOCABULARY,
    child_processes.SIGTERM,
    child_processes.SPAWNED_WORKER,
    child_processes.DEAD_WORKER,
]
ROWS = [
    *((row.contract or row.make.__name__, row.upstream, row.reason) for table in TABLES for row in table.rows),
    *((hook.hook, hook.upstream, hook.reason) for hook in hooks.HOOKS),
]


def test_every_table_is_looked_at():
    """But the CPU engine's, whose rows answer calls from everywhere, and those of symbols and of a run's hooks."""
    elsewhere = {"table", "cpu", "hooks"}
    calls = [
        n
        for path in PACKAGE.glob("patches/*.py")
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "Table" and path.stem not in elsewhere
    ]
    symbols = 1
    assert len(calls) == len(TABLES) + symbols


@pytest.mark.parametrize(("name", "upstream", "reason"), ROWS, ids=[f"{name}-{line}" for name, line, _ in ROWS])
def test_every_row_has_a_reason_and_a_contract_on_the_line_that_it_names(name, upstream, reason):
    file, _, line = upstream.rpartition(":")
    places = [node(c.file, c.name) for c in CONTRACTS if (c.patch, c.file) == (name, file)]
    # a contract on a whole file has no lines of its own and spans any
    spans = [(getattr(p, "lineno", 1), getattr(p, "end_lineno", 10**6)) for p in places]
    assert any(first <= int(line) <= last for first, last in spans), f"no contract of {name} spans {upstream}"
    assert len(reason) > 5


def test_the_lines_that_docstrings_name_are_those_of_the_contracts():
    named, astray = 0, []
    functions = [n for path in FILES for n in ast.parse(path.read_text()).body]
    for n in functions:
        text = ast.get_docstring(n) if isinstance(n, ast.FunctionDef) else None
        for file, line in re.findall(r"\(((?:core|training)/[\w/]+\.py):(\d+)", text or ""):
            places = [node(c.file, c.name) for c in CONTRACTS if (c.patch, c.file) == (n.name, file)]
            # a contract on a whole file has no lines of its own and spans any
            spans = [(getattr(p, "lineno", 1), getattr(p, "end_lineno", 10**6)) for p in places]
            named += 1
            if not any(first <= int(line) <= last for first, last in spans):
                astray.append(f"{n.name}: {file}:{line}")
    assert astray == []
    assert named > 8
