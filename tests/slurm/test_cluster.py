"""start_cluster.sh itself: clusters side by side, a node that comes back, and nothing left behind."""

import subprocess

from tests.slurm.cluster import START, Cluster, Job, outside, processes, wait_until

STUBBORN = "#!/usr/bin/env bash\nsrun bash -c 'trap \"\" TERM; setsid sleep 600 & sleep 600'\n"


def test_two_clusters_stand_side_by_side_and_one_ends_without_the_other(cluster, tmp_path):
    other = Cluster.start(tmp_path / "other", nodes=3)
    try:
        names = [
            one.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME").split() for one in (cluster, other)
        ]
        assert [sorted(found) for found in names] == [["n1", "n2"], ["n1", "n2"]]
        (tmp_path / "stubborn.sbatch").write_text(STUBBORN)
        job = Job.submit(other, str(tmp_path / "stubborn.sbatch"), tmp_path / "logs", ["--nodes=3"], [])
        asleep = ["sleep", "600"]
        wait_until(lambda: [p.words for p in job.processes()].count(asleep) == 6, 30, "the job sleeps", job.report)
    finally:
        other.stop()
    assert list(processes(other.folder)) == []
    assert cluster.run("sinfo", "--noheader", "--format", "%D %t").split() == ["2", "idle"]


def test_a_node_dies_and_comes_back(tmp_path):
    one = Cluster.start(tmp_path / "one", nodes=1)
    try:
        (tmp_path / "long.sbatch").write_text("#!/usr/bin/env bash\nsleep 600\n")
        job = Job.submit(one, str(tmp_path / "long.sbatch"), tmp_path / "logs", [], [])
        wait_until(job.processes, 30, "the job runs", job.report)
        one.kill_node("n1")
        one.miss("n1")
        assert job.processes() == [] and job.states() == ["PENDING"]
        one.start_node("n1")
        wait_until(job.processes, 60, "the job runs again", job.report)
        assert job.facts()["Restarts"] == "1"
    finally:
        one.stop()


def test_mistakes_are_one_line(tmp_path):
    for words, said in (
        (["stop", tmp_path], f"error: {tmp_path} has no slurm.conf: give the folder of a cluster\n"),
        (["start", tmp_path, "none"], "error: NODES is none: give a number from 1 to 99\n"),
    ):
        done = subprocess.run([START, *words], env=outside(), capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
