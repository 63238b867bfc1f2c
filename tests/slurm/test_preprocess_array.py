"""Shards of a corpus as a job array, and their merge behind it, give the files of a single run byte for byte."""

import random
import subprocess
import sys

from tests.data.corpora import write
from tests.slurm.cluster import ROOT, Job, outside

SCRIPT = "examples/slurm/preprocess_array.sbatch"
SHARDS = 4
FLAGS = ["--tokenizer-type", "ByteTokenizer", "--append-eod"]


def test_an_array_and_its_merge_equal_the_single_run(cluster, tmp_path):
    draw = random.Random(0)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        write(tmp_path / "corpus" / name, [f"{name} {i} " + "word " * draw.randint(1, 200) for i in range(500)])
    corpus, single, sharded = (str(tmp_path / name) for name in ("corpus", "single/x", "sharded/x"))
    (tmp_path / "single").mkdir()
    (tmp_path / "sharded").mkdir()
    command = [sys.executable, "tools/preprocess_data.py", "--input", corpus, "--output-prefix", single, *FLAGS]
    subprocess.run(command, cwd=ROOT, env=outside(), check=True, capture_output=True, timeout=120)

    where = {"INPUT": corpus, "OUTPUT_PREFIX": sharded}
    size, logs = ["--cpus-per-task=1", "--mem=0", "--oversubscribe"], tmp_path / "logs"
    array = Job.submit(cluster, SCRIPT, logs, [*size, f"--array=0-{SHARDS - 1}"], FLAGS, **where)
    after = [*size, f"--dependency=afterok:{array.number}", "--kill-on-invalid-dep=yes"]
    merge = Job.submit(cluster, SCRIPT, logs, after, [], **where)
    assert array.wait(180) == ["COMPLETED"] * SHARDS, array.report()
    assert merge.wait(120) == ["COMPLETED"], merge.report()
    for end in (".bin", ".idx"):
        mine = (tmp_path / f"sharded/x_text_document{end}").read_bytes()
        assert mine == (tmp_path / f"single/x_text_document{end}").read_bytes() and len(mine) > 1000
    shards = list((tmp_path / "sharded").glob("*.shard-*.bin"))
    assert len(shards) == SHARDS and len({path.read_bytes() for path in shards}) == SHARDS
