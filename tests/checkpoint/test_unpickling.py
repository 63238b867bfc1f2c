"""Pickles put into a whole, sealed checkpoint or an index cache: nothing of them runs, and the error names them."""

import contextlib
import io
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.run_folder.checkpoints import problems, seal
from tests.checkpoint.test_saving import FLAGS
from tests.support.program import end, train
from tests.support.training import folder

STEP = "iter_0000002"
RUN = f"{FLAGS} --train-iters 2"


class Attack:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def saved_bytes(thing: Any) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.getvalue()


def replace_entry(checkpoint: Path, name: str, content: bytes) -> None:
    """Puts other content into an object entry, behind what is in its file."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if name in index.fqn)
    place = metadata.storage_data[index]
    file = checkpoint / place.relative_path
    place.offset, place.length = file.stat().st_size, len(content)
    with file.open("ab") as stream:
        stream.write(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def attack(checkpoint: Path, where: str, mark: Path) -> None:
    """Puts a pickle into a checkpoint, and a manifest that says that all is whole."""
    import torch

    payload = Attack(mark)
    if where == ".metadata":
        (checkpoint / where).write_bytes(pickle.dumps(payload))
    elif where == ".metadata, inside":
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        metadata.planner_data = {"a": payload}
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    elif where == "common.pt":
        (checkpoint / where).write_bytes(saved_bytes({"args": payload, "iteration": 2}))
    elif where == "_extra_state":  # tensors in such a state are unpickled one level deeper
        deeper = bytearray(pickle.dumps(Inside(saved_bytes(payload))))
        replace_entry(checkpoint, where, saved_bytes(torch.frombuffer(deeper, dtype=torch.uint8)))
    else:
        replace_entry(checkpoint, where, saved_bytes([payload]))
    (checkpoint / "integrity.json").unlink()
    seal(checkpoint)


class Inside:
    """Unpickled, loads its bytes by torch's function for storages, which has no limits."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        import torch

        return torch.storage._load_from_bytes, (self.content,)


ATTACKS = [".metadata", ".metadata, inside", "common.pt", "common_state", "rng_state", "rerun_state", "_extra_state"]


def attempts(run: str, marks: str) -> dict[str, dict[str, Any]]:
    """By attack: what the program and the function behind the tools said, and whether the pickle ran."""
    from megatron_hybrid.checkpoint.weights import open_checkpoint

    found = {}
    for number, where in enumerate(ATTACKS):
        mark, there = Path(marks) / f"ran{number}", Path(run).with_name(f"attacked{number}")
        shutil.copytree(run, there)
        attack(there / STEP, where, mark)
        out, said = io.StringIO(), ""
        with contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
            train(f"{RUN} --train-iters 4 --load {there} --save {there}".split())
        try:
            open_checkpoint(str(there))
        except ValueError as error:
            said = str(error)
        whole = problems(there / STEP) == []
        found[where] = {"program": out.getvalue(), "tool": said, "whole": whole, "ran": mark.exists()}
        if number == 0:  # the attack itself works
            with contextlib.suppress(Exception):
                pickle.loads((there / STEP / ".metadata").read_bytes())
            found[where]["works"] = mark.exists()
    return found


@pytest.fixture(scope="module")
def found(ranks, tmp_path_factory):
    where = tmp_path_factory.mktemp("attacks")
    ranks(1).run(end, argv=f"{RUN} --save {folder(where / 'run')}".split())
    return ranks(1).run(attempts, run=str(where / "run"), marks=str(where))[0]


@pytest.mark.parametrize("where", ATTACKS)
def test_a_pickle_in_a_sealed_checkpoint_does_not_run(found, where):
    one = found[where]
    assert one["whole"] and not one["ran"]
    file = {".metadata, inside": ".metadata", "common.pt": "common.pt", ".metadata": ".metadata"}.get(
        where, ".distcp, entry"
    )
    for text in (one["program"].removeprefix("error: ").strip(), one["tool"]):
        assert file in text and "posix.mkdir" in text and "is refused" in text and "\n" not in text


def test_the_attack_would_run_without_limits(found):
    assert found[".metadata"]["works"]


def caches(where: str) -> dict[str, Any]:
    """What the index cache's reader gives of numbers, and says of a pickle."""
    import numpy as np
    from megatron.core.datasets import blended_dataset, gpt_dataset

    numbers, objects, mark = (Path(where) / name for name in ("a.npy", "b.npy", "mark"))
    np.save(numbers, np.arange(5))
    np.save(objects, np.array([Attack(mark)], dtype=object), allow_pickle=True)
    (Path(where) / "c.npy").write_bytes(pickle.dumps(Attack(mark)))
    said = []
    for module in (blended_dataset, gpt_dataset):
        for file in (objects, Path(where) / "c.npy"):
            try:
                module.safe_numpy_load(str(file), allow_pickle=True, mmap_mode="r")
            except ValueError as error:
                said.append(str(error))
    return {
        "sum": int(gpt_dataset.safe_numpy_load(str(numbers), allow_pickle=True, mmap_mode="r").sum()),
        "said": said,
    } | {"ran": mark.exists()}


def test_a_pickle_in_an_index_cache_does_not_run(ranks, tmp_path):
    (result,) = ranks(1).run(caches, where=str(tmp_path))
    assert result["sum"] == 10 and not result["ran"]
    assert len(result["said"]) == 4 and all("is no array of numbers but a pickle" in said for said in result["said"])


def admitted() -> dict[str, list[str]]:
    """Names of what torch.load admits in this process beyond its own list, and of our list."""
    import torch

    from megatron_hybrid.patches.unpickling import OBJECTS

    things = [thing[0] if isinstance(thing, tuple) else thing for thing in torch.serialization.get_safe_globals()]
    names = {f"{thing.__module__}.{thing.__qualname__}" for thing in things}
    return {"torch's": sorted(n for n in names if n.startswith("torch.")), "listed": sorted(OBJECTS)} | {
        "others": sorted(n for n in names if not n.startswith("torch.")),
        "python": list(sys.version_info[:2]),
    }


def test_what_objects_may_name_is_what_is_listed(ranks):
    result = ranks(1).run(admitted)[0]
    assert set(result["others"]) <= set(result["listed"]), "Megatron admits more now: look at it, then list it"
