"""The table of Megatron's flags: what it refuses, and what it says at the start of a run."""

from pathlib import Path

import pytest

from megatron_hybrid.cli.flag_table import all_flags, rules

DOCUMENT = Path(__file__).parents[2] / "docs" / "flags.md"


def test_the_document_is_made_of_the_table():
    made = "python -m megatron_hybrid.cli.flag_table.all_flags > docs/flags.md"
    assert DOCUMENT.read_text() == all_flags.document(), made


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--lr 1 --rotary-seq-len-interpolation-factor 2", "--use-rope-scaling"),
        ("--no-rope-freq=4", "--no-rope-freq is not supported"),
        ("--dataloader-inter-document-masking", "Use --reset-attention-mask"),
        ("--sft", "fine-tuning"),
        ("--decoder-first-pipeline-num-layers 2", "--balance-pipeline"),
        ("--qk-layernorm", "do not normalise"),
        ("--window-size 8,0", "--swa-window"),
        ("--rampup-batch-size 2 2 8", "--step-batch-size-schedule"),
        ("--yaml-cfg x.yaml", "flags and recipes"),
        ("--use-megatron-fsdp", "Megatron's DDP"),
        ("--img-h 3 --freeze-all-layers --sft", "--freeze-all-layers is not supported"),  # the first that is refused
    ],
)
def test_a_flag_that_no_value_would_do_for_is_refused(line, words):
    with pytest.raises(ValueError, match="is not supported: .* Drop it\\.$") as error:
        all_flags.refuse(line.split())
    assert words in str(error.value)


def test_others_pass_and_idle_ones_are_named():
    line = ["--lr", "1", "--img-h", "3", "--tensorboard-dir", "--save-retain-interval", "4", "--indexer-batch-size=2"]
    all_flags.refuse(line)  # --save-retain-interval has a rule that knows its value
    assert all_flags.notes(line) == ["without effect on this run: --img-h --indexer-batch-size (docs/flags.md)"]
    assert all_flags.notes(["--lr", "1"]) == []


def test_intervals_that_a_run_does_not_give():
    assert rules.defaults(["--save", "x"]) == ["--eval-interval", "1000000000", "--save-interval", "1000"]
    assert rules.defaults(["--save=x", "--persistent-save-interval=3", "--eval-interval", "5"]) == []
    assert rules.defaults(["--save-retain-interval", "5", "--eval-interval=1"]) == []
