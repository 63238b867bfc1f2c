"""TensorBoard and Weights & Biases, both Megatron's, get the figures of this project: in their files, off line."""

from pathlib import Path

from tests.cli.test_command_line import PROGRAM, run

FLAGS = """--recipe demo --expert-model-parallel-size 1 --train-iters 4 --lr-wsd-decay-iters 2 --seq-length 64
    --micro-batch-size 1 --global-batch-size 2 --tokenizer-type NullTokenizer --vocab-size 100 --mock-data
    --eval-interval 100 --eval-iters 1 --log-interval 2 --tensorboard-log-interval 2 --device cpu"""
NAMES = ("tokens-per-second", "tflops-per-gpu", "expert-load-max-over-mean/8", "lm loss", "grad-norm")
"""The first three are ours, the others Megatron's."""


def test_both_have_our_figures(tmp_path):
    words = f"""{FLAGS} --tensorboard-dir {tmp_path}/tensorboard --wandb-project hybrids --wandb-exp-name one
        --wandb-save-dir {tmp_path}/wandb --save {tmp_path}/run"""
    done = run(PROGRAM, *words.split(), WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr[-3000:]
    scalars = tensorboard(tmp_path / "tensorboard")
    (path,) = (tmp_path / "wandb").rglob("offline-run-*/run-*.wandb")
    logged = path.read_bytes()  # records in protobuf: names stand in it as they are
    for name in NAMES:
        assert scalars[name] == [2, 4], name
        assert name.encode() in logged, name


def tensorboard(folder: Path) -> dict[str, list[int]]:
    """Scalars to their iterations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
