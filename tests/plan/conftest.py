"""Megatron's help texts are parsed once for all plans of a process."""

import pytest

from tests.plan.support import DEMO, planned


@pytest.fixture(scope="module", autouse=True)
def help_texts_are_read_once():
    """Megatron parses them out of its sources for every command line, which is most of the time of a reading."""
    planned(DEMO)  # the CPU engine comes before any of Megatron
    from megatron.training.argument_utils import ArgumentGroupFactory

    read_texts, known = ArgumentGroupFactory._get_field_docstrings, {}

    def once(self, described):
        if described not in known:
            known[described] = read_texts(self, described)
        return known[described]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentGroupFactory, "_get_field_docstrings", once)
        yield
