"""The cluster itself does what the other tests rely on: GPUs are given out, exit codes are seen, jobs are preempted."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until

pytestmark = pytest.mark.slurm


def submit(cluster: Cluster, *arguments: str, script: str) -> str:
    """The id of a job that runs a line of shell."""
    return cluster.ask("sbatch", "--parsable", "--output=/dev/null", *arguments, "--wrap", script)


def state(cluster: Cluster, job: str) -> str:
    """What the controller says of a job."""
    return cluster.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def test_jobs_on_one_node_are_given_different_gpus(cluster: Cluster, tmp_path: Path):
    script = f'sleep 2; echo "$CUDA_VISIBLE_DEVICES" > {tmp_path}/$SLURM_JOB_ID'
    jobs = [submit(cluster, "--gres=gpu:2", f"--nodelist={cluster.names[0]}", script=script) for _ in range(2)]
    assert wait_until(lambda: all(state(cluster, job) == "COMPLETED" for job in jobs), 30)
    assert sorted((tmp_path / job).read_text().strip() for job in jobs) == ["0,1", "2,3"]


def test_a_job_that_asks_for_what_no_node_has_is_refused(cluster: Cluster):
    with pytest.raises(RuntimeError, match="not available"):
        submit(cluster, f"--gres=gpu:{cluster.gpus + 1}", script="true")


def test_accounting_knows_how_jobs_ended(cluster: Cluster):
    jobs = [submit(cluster, script=f"exit {code}") for code in (0, 3)]

    def known() -> list[str]:
        return cluster.ask("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", ",".join(jobs)).split()

    assert wait_until(lambda: known() == ["COMPLETED|0:0", "FAILED|3:0"], 30), known()


def test_a_job_that_is_preempted_hears_its_signal_and_can_start_again(cluster: Cluster, tmp_path: Path):
    step = tmp_path / "step.sh"
    step.write_text(
        "trap 'scontrol requeue $SLURM_JOB_ID' USR2\n"  # as submitit does
        'if [ -z "$SLURM_RESTART_COUNT" ]; then while true; do sleep 0.2; done; fi\n'
    )
    everything = ["--exclusive", f"--nodelist={cluster.names[0]}"]
    # srun, as --signal goes to the steps of a job and not to its script
    job = submit(cluster, *everything, "--requeue", "--signal=USR2@60", script=f"srun bash {step}")
    assert wait_until(lambda: state(cluster, job) == "RUNNING", 30)
    urgent = submit(cluster, *everything, "--partition=high", script="sleep 1")
    assert wait_until(lambda: state(cluster, urgent) == "COMPLETED", 60)
    assert wait_until(lambda: state(cluster, job) == "COMPLETED", 60)
    assert "Restarts=1" in cluster.ask("scontrol", "show", "job", job)


def test_a_killed_controller_comes_back_with_its_jobs(cluster: Cluster):
    job = submit(cluster, script="sleep 300")
    assert wait_until(lambda: state(cluster, job) == "RUNNING", 30)
    asked = time.time()
    cluster.ask("scontrol", "update", f"JobId={job}", "Comment=saved")  # the controller writes within seconds
    assert wait_until(lambda: (cluster.root / "state/job_state").stat().st_mtime > asked, 30)
    cluster.end("slurmctld", kill=True)
    assert cluster.pid_of("slurmctld") is None
    cluster.start()
    assert state(cluster, job) == "RUNNING"
    cluster.ask("scancel", job)
    assert wait_until(lambda: state(cluster, job) == "CANCELLED", 30)


def test_only_its_own_processes_are_ended(cluster: Cluster, tmp_path: Path):
    stranger = Cluster(root=tmp_path, nodes=1, cpus=1, gpus=1, ports=())
    (tmp_path / "pids").mkdir()
    (tmp_path / "pids/slurmctld").write_text(f"{os.getpid()} 1")  # this process, but for its time of birth
    assert stranger.pid_of("slurmctld") is None
    stranger.end("slurmctld", kill=True)  # would end pytest
    assert cluster.pid_of("slurmctld") is not None


def test_a_folder_that_other_users_may_not_enter_is_refused(tmp_path: Path):
    assert tmp_path.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match=f"chmod o\\+x {tmp_path}"):
        Cluster.make(tmp_path / "closed", nodes=1, cpus=1, gpus=1)
    assert not (tmp_path / "closed").exists()


def test_a_cluster_that_did_not_start_leaves_nothing_behind():
    closed = Cluster.make(Path(tempfile.mkdtemp(prefix="lab-slurm-")), nodes=1, cpus=1, gpus=1)
    closed.root.chmod(0o700)  # munge wants folders that every user may enter
    with pytest.raises(RuntimeError, match=r"munged did not come up(.|\n)*execute permissions"):
        closed.start()
    closed.purge()
    assert not closed.root.exists()
    assert str(closed.root) not in Path("/etc/hosts").read_text()
