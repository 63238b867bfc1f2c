"""The mechanism of patches: applied in order and as a whole, refused where the order is not stated, taken back."""

from typing import Any

import pytest

from megatron_hybrid.patches import patching
from megatron_hybrid.patches.patching import Patch, Table, Value, install, replaced, uninstall, uninstall_run


class Base:
    def greet(self) -> str:
        return "base"


class Upstream(Base):
    """Stands for a class of Megatron's."""

    size = 1

    @staticmethod
    def name() -> str:
        return "upstream"


def wrapped_by(mark: str) -> Any:
    def wrap(there: Any) -> Any:
        return lambda *args: f"{mark}({there(*args)})"

    return wrap


@pytest.fixture(autouse=True)
def nothing_stays():
    before, names = dict(vars(Upstream)), list(patching._installed)
    yield
    for name in reversed([name for name in patching._installed if name not in names]):
        uninstall(name)
    assert dict(vars(Upstream)) == before


def one(name: str, *rows: Patch, **more: Any) -> Table:
    return Table(name, rows, **more)


INNER, OUTER = (Patch(Upstream, "greet", wrapped_by(mark), "a reason") for mark in ("inner", "outer"))


def test_rows_are_applied_in_order_and_taken_back():
    install(one("both", INNER, OUTER, Patch(Upstream, "size", Value(2), "a reason")))
    assert (Upstream().greet(), Upstream.size) == ("outer(inner(base))", 2)
    uninstall("both")
    assert (Upstream().greet(), Upstream.size) == ("base", 1)
    assert "greet" not in vars(Upstream), "it is inherited again"


def test_a_static_method_stays_one_when_it_is_taken_back():
    install(one("static", Patch(Upstream, "name", lambda there: staticmethod(lambda: f"our {there()}"), "a reason")))
    assert Upstream().name() == "our upstream"
    uninstall("static")
    assert Upstream().name() == "upstream"


def test_the_same_table_twice_is_installed_once():
    install(one("same", INNER))
    install(one("same", INNER))
    assert Upstream().greet() == "inner(base)"


def test_other_replacements_under_the_same_name_are_an_error():
    install(one("same", Patch(Upstream, "size", Value(2), "a reason")))
    with pytest.raises(RuntimeError, match="'same' are installed with other replacements"):
        install(one("same", Patch(Upstream, "size", Value(3), "a reason")))
    assert Upstream.size == 2


def test_a_table_comes_after_those_that_it_names():
    with pytest.raises(RuntimeError, match="'second' come after those of 'first', which are not installed"):
        install(one("second", OUTER, after=("first",)))
    install(one("first", INNER))
    install(one("second", OUTER, after=("first",)))
    assert Upstream().greet() == "outer(inner(base))"


def test_two_tables_on_one_attribute_must_state_their_order():
    install(one("first", INNER))
    with pytest.raises(RuntimeError, match="Upstream.greet is patched by 'first', and the patches of 'second' are not"):
        install(one("second", OUTER))
    assert Upstream().greet() == "inner(base)"


def test_what_is_wrapped_by_a_later_table_cannot_be_taken_back_first():
    install(one("first", INNER))
    install(one("second", OUTER, after=("first",)))
    with pytest.raises(RuntimeError, match="Upstream.greet was replaced after the patches of 'first'"):
        uninstall("first")
    uninstall("second")
    assert Upstream().greet() == "inner(base)"


def test_a_table_that_fails_changes_nothing():
    gone = Patch(Upstream, "colour", Value("red"), "a reason")
    with pytest.raises(RuntimeError, match="Upstream has no colour: it has changed upstream"):
        install(one("half", INNER, gone))
    assert Upstream().greet() == "base"
    added = Patch(Upstream, "size", Value(2), "a reason", adds=True)
    with pytest.raises(RuntimeError, match="Upstream has a size: it has changed upstream"):
        install(one("half", INNER, added))
    assert (Upstream().greet(), Upstream.size) == ("base", 1)


def test_the_tables_of_a_run_are_taken_back_and_no_others():
    install(one("process", Patch(Upstream, "size", Value(2), "a reason")))
    install(one("first", INNER, of_run=True))
    install(one("second", OUTER, after=("first",), of_run=True))
    uninstall_run()
    assert (Upstream().greet(), Upstream.size) == ("base", 2)


def test_a_scoped_replacement_ends_with_its_block_and_with_an_error():
    with pytest.raises(KeyError), replaced(Upstream, "greet", wrapped_by("ours")):
        assert Upstream().greet() == "ours(base)"
        raise KeyError
    assert Upstream().greet() == "base"


def test_owners_are_found_by_their_path():
    with replaced("tests.patches.test_patching:Upstream", "size", Value(2)):
        from tests.patches.test_patching import Upstream as found

        assert found.size == 2
    assert found.size == 1


# Megatron's, in ranks --------------------------------------------------------------------------------


def order_of_hooks() -> dict[str, Any]:
    """For each function, the hooks that are entered, from the outermost in; they are given in reverse order."""
    from importlib import import_module

    from megatron_hybrid.patches import hooks

    entered: list[str] = []

    def hook(name: str) -> hooks.Wrapper:
        def wrap(there: Any) -> Any:
            def called(*args: Any) -> Any:
                entered.append(name)
                return None if there.__module__.startswith("megatron.") else there(*args)

            return called

        return wrap

    names = list(dict.fromkeys(row.hook for row in hooks.HOOKS))
    hooks.install_hooks({name: hook(name) for name in reversed(names)})
    found = {}
    try:
        for row in hooks.HOOKS:
            entered.clear()
            getattr(import_module(row.owner), row.function)()
            found[row.function] = list(entered)
        errors = []
        for given in ({"count_flops": hook("other")}, {"no such": hook("other")}):
            try:
                hooks.install_hooks(given)
            except (RuntimeError, ValueError) as error:
                errors.append(str(error))
    finally:
        uninstall_run()
    upstreams = [getattr(import_module(row.owner), row.function).__module__ for row in hooks.HOOKS]
    return {"found": found, "errors": errors, "upstreams": set(upstreams)}


def test_the_hooks_of_a_run_wrap_one_another_in_the_order_of_the_table(ranks):
    result = ranks(1).run(order_of_hooks)[0]
    several = {function: entered for function, entered in result["found"].items() if len(entered) > 1}
    assert several == {
        "dummy_train_step": ["stop_clock", "draw_skipped_batch"],
        "evaluate_and_print_results": ["validate_whole_sets", "record_validation"],
        "train_step": ["measure_step", "watch_step"],
    }
    assert "installed with other replacements" in result["errors"][0]
    assert "no hook is called no such" in result["errors"][1]
    assert all(module.startswith("megatron.") for module in result["upstreams"])


def prepare_again() -> dict[str, Any]:
    """Whether preparing this process again changes nothing, and what another stack ends in."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    from megatron_hybrid.model.loss_head import HybridLossModel
    from megatron_hybrid.model.stack import HybridLayerStack
    from megatron_hybrid.patches import parsing, upstream

    before = ChainedOptimizer.load_state_dict
    notes = [upstream.prepare("cpu", HybridLayerStack, HybridLossModel) for _ in range(2)]
    parsing.before_parsing()
    try:
        upstream.prepare("cpu", dict, HybridLossModel)
        error = ""
    except RuntimeError as e:
        error = str(e)
    same = ChainedOptimizer.load_state_dict is before and hybrid_block.HybridStack is HybridLayerStack
    return {"same": same, "notes": notes, "error": error}


def test_a_process_may_be_prepared_twice_and_not_otherwise(ranks):
    result = ranks(1).run(prepare_again)[0]
    assert result["same"] and result["notes"][0] == result["notes"][1] != []
    assert "'building' are installed with other replacements" in result["error"]
