"""What each flag of Megatron's is to a hybrid: supported, translated, refused or without effect.

The rows are in :mod:`.layers`, :mod:`.training` and :mod:`.surroundings`; docs/flags.md is made of them by
``python -m megatron_hybrid.cli.flag_table.all_flags``. What they refuse is refused here; :mod:`.rules` and checks.py
look at values.
"""

from collections.abc import Iterator, Sequence

from megatron_hybrid.cli.flag_table import layers, surroundings, training
from megatron_hybrid.cli.flag_table.rows import Row

FAMILIES: dict[str, list[Row]] = {**layers.FAMILIES, **training.FAMILIES, **surroundings.FAMILIES}

HEADING = """# Flags of Megatron

What becomes of each flag of `megatron.training` (Megatron-Core 0.19.2) in a hybrid's run. Made by
`python -m megatron_hybrid.cli.flag_table.all_flags > docs/flags.md` from the table that the program itself refuses by
(`megatron_hybrid/model/flags/`); a test compares it with Megatron's parser. Our own flags are in
`pretrain_hybrid.py --help`.

- **supported**: does here what it does upstream.
- **translated**: taken, and carried out by something of ours.
- **no effect**: taken, and does nothing in pretraining, as upstream; a note at the start of the run names it.
- **refused**: one paragraph and exit code 2, before the model is built.

Values and combinations that cannot work are refused in the same way (`cli/flag_table/rules.py`, `cli/checks.py`), with
what to change. The mark * stands for what was not tried here: it needs a GPU, several hosts or a package that the tests
do not have. All else was run here, on the CPU engine for a step or more, or on one GPU.
"""


def rows() -> Iterator[Row]:
    """All rows of all families."""
    for family in FAMILIES.values():
        yield from family


def of(kind: str) -> dict[str, Row]:
    """The rows of a kind, by each of their flags."""
    return {flag: row for row in rows() if row.kind == kind for flag in row.flags.split()}


def refuse(argv: Sequence[str]) -> None:
    """Refuses the flags of a command line that the table refuses.

    Raises:
        ValueError: The first of them, with the reason.
    """
    refused = of("refused")
    for flag in _given(argv):
        if flag in refused and not refused[flag].by_rule:
            raise ValueError(f"{flag} is not supported: {refused[flag].note}. Drop it.")


def notes(argv: Sequence[str]) -> list[str]:
    """A line for the flags of a command line that do nothing, if there are any."""
    idle = of("no effect")
    found = sorted(flag for flag in _given(argv) if flag in idle)
    return [f"without effect on this run: {' '.join(found)} (docs/flags.md)"] if found else []


def document() -> str:
    """docs/flags.md."""
    parts = [HEADING]
    for name, family in FAMILIES.items():
        parts.append(f"## {name}\n\n| flags | | |\n|---|---|---|")
        for row in family:
            flags = " ".join(f"`{flag}`" for flag in row.flags.split())
            parts[-1] += f"\n| {flags} | {row.kind}{'' if row.tried else ' *'} | {row.note} |"
        parts[-1] += "\n"
    return "\n".join(parts)


def _given(argv: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(word.split("=", 1)[0] for word in argv if word.startswith("--")))


if __name__ == "__main__":
    print(document(), end="")
