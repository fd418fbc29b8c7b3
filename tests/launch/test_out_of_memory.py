"""A run that the kernel refuses memory to: it says what fits, and with that goes on as if nothing had been."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lab.engine.accounting import CLOCKED
from rlhf_lab.engine.learner import Learner
from rlhf_lab.launch.compose import ROOT
from rlhf_lab.launch.execute import RunFailed, execute

# 256 rows in one microbatch hold a few hundred MB of activations; the limit holds in the updates
LIMITED = """
import resource, sys
from pathlib import Path
from rlhf_lab.engine.learner import Learner
from rlhf_lab.launch.main import main

update = Learner.update

limits = []

def limited(*arguments):
    if not limits:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits.append(pages * resource.getpagesize() + 80 * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limits[0], -1))
    try:
        return update(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

Learner.update = limited
main()
"""
TYPED = (
    *("debug=smoke", "algorithm=sft", "stage.batch_size=256", "dataset.train_size=512", "stage.epochs=2"),
    *("stage.checkpoint_every=1", "model.frozen_layers=0"),
)


def measured(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKED)} for line in lines]


def limited(*typed: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", LIMITED, *typed],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux heeds a limit of the address space")
def test_a_run_that_ran_out_goes_on_with_the_microbatch_that_it_named(plan_of, tmp_path, without_reports, monkeypatch):
    typed = [*TYPED, f"runs_dir={tmp_path}"]
    execute(plan_of(*typed, "learner.tokens_at_once=4096", "name=whole"))
    update, steps = Learner.update, []

    def stops(*arguments):
        steps.append(len(steps))
        if len(steps) == 3:
            raise RuntimeError("stopped")
        return update(*arguments)

    monkeypatch.setattr(Learner, "update", stops)
    with pytest.raises(RunFailed):
        execute(plan_of(*typed, "learner.tokens_at_once=4096", "name=broken"))

    run, budget, tries, done = tmp_path / "broken", 100_000, 0, 2
    while (answer := limited(*typed, f"learner.tokens_at_once={budget}", "name=broken")).returncode:
        said = json.loads((run / "status.json").read_text())
        assert said["state"] == "failed"
        assert re.match(
            r"OutOfMemory: out of memory in the update: ([\d.]+ [KMG]iB more were asked for, )?[\d.]+ GiB in use",
            said["error"],
        )
        assert said["error"].split("OutOfMemory: ")[1] in answer.stderr + answer.stdout
        assert done <= said["progress"]["step"] < 4, "a step that fitted is kept, whichever it was"
        done = said["progress"]["step"]
        named = re.search(r"with learner.tokens_at_once=(\d+) continues", said["error"])
        assert named, said["error"]
        smaller = int(named[1])
        assert smaller < budget
        budget, tries = smaller, tries + 1
    assert tries >= 1, "nothing was refused"
    found, expected = measured(run), measured(tmp_path / "whole")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert math.isclose(value, other[name], rel_tol=1e-4, abs_tol=1e-6), (line["step"], name)
    sittings = json.loads((run / "environment.json").read_text())["sittings"]
    assert f"learner.tokens_at_once: 4096 -> {budget}" in sittings[-1]["differs"]
    assert "differs" not in sittings[0]
