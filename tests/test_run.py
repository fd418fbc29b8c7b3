"""One run, one directory: taken by one process, refused to another configuration, never half-written."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_lab.console import Console
from rlhf_lab.engine.checkpoint import checkpoints
from rlhf_lab.run import Run, RunRefused, difference, is_finished
from rlhf_lab.stopping import Stopped
from rlhf_lab.tracking import NoTracker

CONFIG = {"seed": 3, "keep_checkpoints": 2, "stage": {"steps": 4}}


def open_run(directory: Path, **changes: object) -> Run:
    return Run.open(
        directory,
        config={**CONFIG, **changes},
        overrides=["seed=3"],
        artifacts={},
        tracker=NoTracker(),
        console=Console(),
    )


def status(directory: Path) -> dict:
    return json.loads((directory / "status.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_difference_names_every_leaf_that_differs():
    before = {"a": {"b": 1, "c": [1, 2]}, "gone": 0}
    after = {"a": {"b": 2, "c": [1, 2]}, "new": 0}
    assert list(difference(before, after)) == ["a.b: 1 -> 2", "gone: 0 -> 'absent'", "new: 'absent' -> 0"]
    assert list(difference(before, before)) == []


def test_another_configuration_is_refused_with_the_difference_and_changes_nothing(tmp_path):
    open_run(tmp_path).close()
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(RunRefused, match=r"stage.steps: 4 -> 5.*name="):
        open_run(tmp_path, stage={"steps": 5})
    assert (tmp_path / "config.yaml").read_text() == before
    open_run(tmp_path).close()  # the first one still may


def test_a_microbatch_may_be_cut_smaller_under_way_and_the_sitting_says_so(tmp_path):
    """What is cut by tokens or by responses in flight wherever it stands, and nothing that only sounds like it."""

    def cut(tokens: int, rows: int) -> dict:
        sampling = {"batch_size": rows, "temperature": 1.0}
        stage = {"learner": {"tokens_at_once": tokens}, "rewards": {"helpful": {"tokens_at_once": tokens}}}
        return {"stage": stage | {"sampling": sampling, "evaluation_sampling": sampling, "batch_size": 4}}

    open_run(tmp_path, **cut(8192, 256)).close()
    run = open_run(tmp_path, **cut(1024, 16))
    run.resume()
    run.close()
    [sitting] = json.loads((tmp_path / "environment.json").read_text())["sittings"]
    assert "stage.rewards.helpful.tokens_at_once: 8192 -> 1024" in sitting["differs"]
    assert "stage.evaluation_sampling.batch_size: 256 -> 16" in sitting["differs"]
    assert len(sitting["differs"]) == 4
    other = cut(8192, 256)
    other["stage"]["batch_size"] = 8  # of an optimiser step
    with pytest.raises(RunRefused, match=r"\(stage.batch_size: 4 -> 8\)"):
        open_run(tmp_path, **other)


def test_a_run_that_was_to_say_its_price_alone_is_stopped_and_the_asking_one_goes_on_with_it(tmp_path):
    with contextlib.closing(open_run(tmp_path, judge={"dry_run": True})) as run:
        run.leave("18 calls")
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("stopped", "18 calls")
    open_run(tmp_path, judge={"dry_run": False}).close()
    with pytest.raises(RunRefused, match=r"judge\.tries"):
        open_run(tmp_path, judge={"dry_run": False, "tries": 2})


def test_a_directory_belongs_to_one_process_at_a_time(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[2]); from tests_open import hold; hold(sys.argv[1])"  # see below
    helper = tmp_path / "tests_open.py"
    helper.write_text(
        "import time\nfrom pathlib import Path\nfrom rlhf_lab.console import Console\nfrom rlhf_lab.run import Run\n"
        "from rlhf_lab.tracking import NoTracker\n"
        "def hold(directory):\n"
        f"    run = Run.open(Path(directory), config={CONFIG!r}, overrides=[], artifacts={{}}, tracker=NoTracker(), "
        "console=Console())\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    run_directory = tmp_path / "run"
    root = Path(__file__).resolve().parents[1]
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run_directory), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunRefused, match=rf"in use by process {holder.pid} on .*name="):
            open_run(run_directory)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    open_run(run_directory).close()  # the lock died with its process


def test_only_a_run_that_said_so_is_finished(tmp_path):
    assert not is_finished(tmp_path)
    run = open_run(tmp_path)
    assert not is_finished(tmp_path)
    run.save(0, {"x": torch.ones(2)})
    run.finish({"loss": 1.0})
    run.drop_checkpoints()
    run.close()
    assert is_finished(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}
    again = open_run(tmp_path)
    assert again.finished
    again.close()
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_environment_says_with_what_and_never_the_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-v4lue")
    open_run(tmp_path).close()
    said = json.loads((tmp_path / "environment.json").read_text())
    assert (
        said["packages"]["torch"] == torch.__version__.split("+")[0] or said["packages"]["torch"] in torch.__version__
    )
    assert len(said["git"]["sha"]) == 40
    for path in tmp_path.iterdir():
        assert "s3cr3t-v4lue" not in path.read_text()


def test_environment_holds_the_hashes_of_what_is_read(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    run = Run.open(
        tmp_path / "run", config=CONFIG, overrides=[], artifacts={"m": folder}, tracker=NoTracker(), console=Console()
    )
    run.close()
    hashes = json.loads((tmp_path / "run/environment.json").read_text())["artifacts"]["m"]["sha256"]
    expected = subprocess.run(["sha256sum", folder / "model.safetensors"], capture_output=True, text=True, check=True)
    assert hashes == {"model.safetensors": expected.stdout.split()[0]}


def filled(tmp_path: Path, **changes: object) -> Run:
    """Steps 0 to 5 logged, checkpoints after 1, 3 and 5, killed in the middle of the line of step 6."""
    run = open_run(tmp_path, **changes)
    for step in range(6):
        run.log(step, {"x": float(step)})
        run.write_rows(f"samples/step_{step:06d}.jsonl", [{"step": step}])
        if step % 2:
            run.save(step, {"step": step, "weights": torch.full((3,), float(step))})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x"')
    return run


def test_two_checkpoints_are_kept_and_the_log_goes_back_to_the_latest(tmp_path):
    run = filled(tmp_path)
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == [5, 3]
    step, state = run.resume() or (None, {})
    assert step == 5
    assert state["weights"].tolist() == [5.0] * 3
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    run.close()


@pytest.mark.parametrize("name", ["tensors.safetensors", "tree.json", "sha256.json"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(tmp_path, capsys, name, harm):
    run = filled(tmp_path)
    victim = tmp_path / "checkpoints/step_000005" / name
    whole = victim.read_bytes()
    if harm == "gone":
        victim.unlink()
    else:
        victim.write_bytes(whole[: len(whole) // 2] if harm == "truncated" else whole[:-3] + b"?" + whole[-2:])
    step, state = run.resume() or (None, {})
    assert step == 3
    assert state["weights"].tolist() == [3.0] * 3
    assert "WARNING damaged checkpoint" in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir())[-1] == "step_000003.jsonl"
    run.close()


def test_when_every_checkpoint_is_damaged_nothing_is_guessed(tmp_path):
    run = filled(tmp_path)
    for _, path in checkpoints(tmp_path / "checkpoints"):
        (path / "tree.json").write_text("{}")
    with pytest.raises(RunRefused, match=r"no sound checkpoint.*remove that folder"):
        run.resume()
    run.close()


def test_without_a_checkpoint_the_log_begins_anew(tmp_path):
    run = open_run(tmp_path)
    run.log(0, {"x": 1.0})
    assert run.resume() is None
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    run.close()


def test_metrics_that_are_not_finite_stay_valid_json(tmp_path):
    run = open_run(tmp_path)
    run.log(0, {"a": float("nan"), "b": float("-inf"), "c": 1.0})
    [line] = lines(tmp_path / "metrics.jsonl")
    assert line == {"step": 0, "a": "nan", "b": "-inf", "c": 1.0}
    run.close()


def test_a_folder_takes_its_name_only_when_it_is_whole(tmp_path):
    run = open_run(tmp_path)

    def fill_and_fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.make("policy", fill_and_fail)
    assert not [path for path in tmp_path.iterdir() if "policy" in path.name]

    def fill(folder: Path) -> None:
        (folder / "whole").write_text("x")

    run.make("policy", fill)
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["whole"]
    run.close()


def test_a_failure_leaves_its_traceback_and_success_takes_it_away(tmp_path):
    run = open_run(tmp_path)
    try:
        raise RuntimeError("the reason")
    except RuntimeError as error:
        run.note_end(type(error), error, None)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["error"]) == ("failed", "RuntimeError: the reason")
    assert "test_run.py" in (tmp_path / "error.txt").read_text()
    run.note_end(None, None, None)
    assert not (tmp_path / "error.txt").exists()
    run.close()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunRefused, match=r"cannot write to .*file/run.*runs_dir="):
        open_run(tmp_path / "file" / "run")


def test_a_read_only_or_full_disk_is_refused_and_nothing_is_half_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        run = open_run(disk / "begun")
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"0" * (free - (100 << 10)))
        with pytest.raises(Exception, match="No space left"):
            run.save(0, {"weights": torch.zeros(100_000)})
        assert list((disk / "begun/checkpoints").iterdir()) == []
        run.close()
        with (disk / "more").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"0" * 4096)
        with pytest.raises(RunRefused, match=r"cannot write to .*No space left.*runs_dir="):
            open_run(disk / "run")
        assert not is_finished(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(RunRefused, match=r"cannot write to .*Read-only.*runs_dir="):
            open_run(disk / "other")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_that_did_nothing_can_be_withdrawn_and_one_that_did_cannot(tmp_path):
    idle = open_run(tmp_path / "idle")
    idle.resume()
    idle.withdraw()
    idle.close()
    assert not (tmp_path / "idle").exists()
    for name, work in (
        ("logged", lambda run: run.log(0, {"x": 1.0})),
        ("saved", lambda run: run.save(0, {"x": 1})),
        ("sampled", lambda run: run.write_rows("samples/step_000000.jsonl", [])),
    ):
        run = open_run(tmp_path / name)
        work(run)
        run.withdraw()
        run.close()
        assert (tmp_path / name / "config.yaml").exists()


def test_what_was_said_before_resuming_stays_and_stands_there_once(tmp_path):
    for _ in range(2):
        run = open_run(tmp_path)
        run.warn(0, "3 rows were dropped")
        run.resume()
        run.warn(1, "diverged")
        run.close()
    assert [line["message"] for line in lines(tmp_path / "warnings.jsonl")] == ["3 rows were dropped", "diverged"]


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path):
    (tmp_path / "checkpoints" / ".step_000002.99.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_000002.99.tmp" / "tensors.safetensors").write_text("half")
    (tmp_path / ".status.json.99.tmp").write_text("half")
    open_run(tmp_path).close()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_that_is_asked_to_stop_saves_first_and_the_request_is_then_gone(tmp_path):
    run = open_run(tmp_path)
    run.checkpoint(1, lambda: {"step": 1}, due=False)
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped, match=r"asked by the file .*stop; the same command continues") as stopped:
        run.checkpoint(2, lambda: {"step": 2}, due=False)
    run.note_end(Stopped, stopped.value, None)
    run.close()
    assert status(tmp_path)["state"] == "stopped"
    assert "error" not in status(tmp_path)
    assert not (tmp_path / "error.txt").exists()
    again = open_run(tmp_path)
    assert again.resume() == (2, {"step": 2})
    again.checkpoint(3, lambda: {"step": 3}, due=False)
    again.pause()
    again.close()


def test_a_request_outlives_the_process_that_was_killed_before_it_heard(tmp_path):
    open_run(tmp_path).close()
    (tmp_path / "stop").touch()
    run = open_run(tmp_path)
    with pytest.raises(Stopped):
        run.pause()
    run.close()


def test_status_says_how_far_and_sums_over_sittings(tmp_path, monkeypatch):
    clock = 1000.0
    monkeypatch.setattr("rlhf_lab.status.time.monotonic", lambda: clock)
    latest = {"objective/scores": 0.5, "objective/kl": float("nan"), "lr": 1.0}
    for sitting in (1, 2):
        run = open_run(tmp_path)
        assert (status(tmp_path)["state"], status(tmp_path)["sittings"]) == ("running", sitting)
        for _ in run.steps("step", 0, 4, latest):
            clock += 10
        # the process is killed here: what was last said stands
        run.close()
        said = status(tmp_path)
        assert said["state"] == "running"
        assert said["seconds"] == 40.0 * sitting
        assert {key: said["progress"][key] for key in ("what", "step", "steps")} == {
            "what": "step",
            "step": 4,
            "steps": 4,
        }
        assert (said["progress"]["reward"], said["progress"]["kl"]) == (0.5, "nan")
        assert "lr" not in said["progress"]
        assert said["host"] == socket.gethostname()
    started = status(tmp_path)["started"]
    run = open_run(tmp_path)
    run.finish({"loss": 1.0})
    run.close()
    assert status(tmp_path)["started"] == started
    assert status(tmp_path)["sittings"] == 3


def test_a_status_that_a_dying_machine_left_empty_is_no_end(tmp_path):
    open_run(tmp_path).close()
    (tmp_path / "status.json").write_text("")
    assert not is_finished(tmp_path)
    open_run(tmp_path).close()
    assert status(tmp_path)["state"] == "running"


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [5, 3]), ("all", [5, 3, 1])])
def test_as_many_checkpoints_are_kept_as_are_asked_for(tmp_path, keep, left):
    run = filled(tmp_path, keep_checkpoints=keep)
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == left
    run.finish({})
    run.drop_checkpoints()
    assert (tmp_path / "checkpoints").exists() == (keep == "all")
    run.close()
    open_run(tmp_path, keep_checkpoints=7).close()  # it changes nothing that a run measures


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_sound_one(tmp_path):
    run = filled(tmp_path)
    (tmp_path / "checkpoints/step_000005/tree.json").write_text("{}")
    run.resume()
    run.save(4, {"step": 4})
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == [4, 3]
    run.close()


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    run = filled(tmp_path)
    (tmp_path / "checkpoints/step_000005.bak").mkdir()
    (tmp_path / "checkpoints/step_000009").mkdir()
    assert (run.resume() or (0,))[0] == 5
    run.close()


def test_every_sitting_is_kept_and_a_change_of_the_code_is_said(tmp_path, monkeypatch, capsys):
    open_run(tmp_path).close()  # killed before it did anything
    run = open_run(tmp_path)
    run.resume()
    run.log(1, {"x": 1.0})
    run.save(1, {"step": 1})
    run.close()
    first = json.loads((tmp_path / "environment.json").read_text())
    monkeypatch.setattr("rlhf_lab.environment.code_digest", lambda: "0" * 64)
    monkeypatch.setattr("rlhf_lab.environment.PACKAGES", ("torch",))
    monkeypatch.setattr("rlhf_lab.environment.metadata.version", lambda name: "99.0")
    monkeypatch.setattr("sys.argv", ["launch.py", "again"])
    run = open_run(tmp_path)
    run.resume()
    run.close()
    said = json.loads((tmp_path / "environment.json").read_text())
    assert [sitting["resumed_from"] for sitting in said["sittings"]] == [None, 1]
    assert said["sittings"][1]["command"] == "launch.py again"
    assert {key: value for key, value in said.items() if key != "sittings"} == {
        key: value for key, value in first.items() if key != "sittings"
    }
    [warning] = lines(tmp_path / "warnings.jsonl")
    assert warning["step"] == 1
    assert f"torch {first['packages']['torch']} -> 99.0" in warning["message"]
    assert "whose files differ" in warning["message"]
    assert capsys.readouterr().out.count("continued under other code or packages") == 1


def test_other_inputs_under_a_run_that_has_begun_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()

    def opened() -> Run:
        return Run.open(
            tmp_path / "run",
            config=CONFIG,
            overrides=[],
            artifacts={"m": folder},
            tracker=NoTracker(),
            console=Console(),
        )

    (folder / "model.safetensors").write_bytes(b"weights")
    opened().close()
    (folder / "model.safetensors").write_bytes(b"others")
    run = opened()  # nothing was made of the first ones
    run.log(0, {"x": 1.0})
    run.close()
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(RunRefused, match=r"begun with another .*model than is there now"):
        opened()


def test_a_run_that_was_frozen_before_says_why_it_was_refused_and_stays(tmp_path):
    open_run(tmp_path).close()
    run = open_run(tmp_path)
    error = ValueError("the data are bad\nin two lines")
    run.note_end(ValueError, error, None)
    run.withdraw()
    run.close()
    assert status(tmp_path)["error"] == "ValueError: the data are bad"
    assert (tmp_path / "config.yaml").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill_up(disk: Path) -> Path:
    """Take all that is left."""
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    return disk / "ballast"


@pytest.mark.parametrize("what", ["metrics", "checkpoint", "samples", "warning", "policy"])
def test_a_disk_that_fills_up_ends_the_run_clearly_and_leaves_nothing_half_written(small_disk, what):
    run = open_run(small_disk / "run")
    for step in (1, 2):
        run.log(step, {"x": float(step)})
        run.warn(step, "careful")
        run.write_rows(f"samples/step_{step:06d}.jsonl", [{"step": step}])
        run.save(step, {"step": step})
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file() and path.name != ".lock"}
    ballast = fill_up(small_disk)
    large = "x" * 10_000

    def fill(folder: Path) -> None:
        (folder / "weights").write_text(large)

    do = {
        "metrics": lambda: run.log(3, dict.fromkeys(map(str, range(2000)), 0.5)),
        "checkpoint": lambda: run.save(3, {"weights": torch.zeros(10_000)}),
        "samples": lambda: run.write_rows("samples/step_000003.jsonl", [{"text": large}]),
        "warning": lambda: run.warn(3, large),
        "policy": lambda: run.make("policy", fill),
    }
    with pytest.raises(OSError, match="No space left") as failure:
        do[what]()
    run.note_end(OSError, failure.value, None)
    run.close()
    assert status(small_disk / "run")["state"] == "failed"
    assert "No space left" in status(small_disk / "run")["error"]
    ballast.unlink()
    after = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file() and path.name != ".lock"}
    own = (small_disk / "run/status.json", small_disk / "run/error.txt")
    assert {path: after[path] for path in after if path not in own} == {p: before[p] for p in before if p not in own}
    again = open_run(small_disk / "run")
    assert again.resume() == (2, {"step": 2})
    again.log(3, {"x": 3.0})
    assert [line["step"] for line in lines(small_disk / "run/metrics.jsonl")] == [1, 2, 3]
    again.close()
