"""The cluster that these tests run on: the one that SLURM_CONF names, or one of their own for as long as they run."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Unavailable, missing_packages


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster of tests/slurm/cluster.py, which this process's SLURM programs find."""
    if named := os.environ.get("SLURM_CONF"):
        root = Path(named).parent
        if not (root / "cluster.json").exists():
            pytest.skip(f"{named} is not of tests/slurm/cluster.py; these tests kill controllers and preempt jobs")
        yield Cluster.read(root)
        return
    if missing := missing_packages():
        pytest.skip(f"no {' '.join(missing)} here; `python tests/slurm/cluster.py start` installs them")
    try:
        # not below tmp_path: munge wants folders that every user may enter
        own = Cluster.make(Path(tempfile.mkdtemp(prefix="lab-slurm-")), nodes=3, cpus=4, gpus=4)
    except Unavailable as reason:
        pytest.skip(f"no cluster: {reason}")
    try:
        own.start()
        os.environ["SLURM_CONF"] = str(own.conf)
        yield own
    finally:
        os.environ.pop("SLURM_CONF", None)
        own.purge()


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For runs that may share their artifacts."""
    return tmp_path_factory.mktemp("place")
