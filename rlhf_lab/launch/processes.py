"""The processes of one run on this node: `python -m rlhf_lab.launch.processes <sweep> <digest of the plan>`.

They are started by torch's elastic agent, one of which is on every node of the job; they meet at the first node. When
one of them is killed all are started again, and continue from the checkpoint that they have in common.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

from rlhf_lab.launch import outcome
from rlhf_lab.launch.job import REFUSED, REQUESTS, Requests, Supervisor, Task, in_slurm, say

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

RESTARTS = 10  # of all ranks, in the life of one launcher
FIRST_PORT, PORTS = 20_000, 12_000  # below those that Linux gives away by itself
MEETING_S = 600  # how long nodes wait for each other


def per_node(num_processes: int, nodes: int) -> int:
    """How many of a run's processes are on each node.

    Raises:
        ValueError: they are not the same number everywhere.
    """
    if num_processes % nodes:
        raise ValueError(
            f"num_processes={num_processes} cannot be the same number on each of {nodes} nodes; "
            f"use num_processes={max(1, round(num_processes / nodes)) * nodes} or change executor.nodes"
        )
    return num_processes // nodes


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process is among the nodes of a job.

    Fields:
        nodes: how many.
        here, first: addresses, of this node and of the one where all meet.
    """

    nodes: int
    is_first: bool
    here: str
    first: str

    @classmethod
    def find(cls) -> "Place":
        """From SLURM, within a job of it; else this machine alone."""
        names = _scontrol("hostnames", os.environ["SLURM_JOB_NODELIST"]).split() if in_slurm() else []
        if len(names) < 2:
            return cls(nodes=1, is_first=True, here="localhost", first="localhost")
        here = os.environ["SLURMD_NODENAME"]
        return cls(nodes=len(names), is_first=here == names[0], here=address(here), first=address(names[0]))

    def meeting_point(self, job: str) -> str:
        """host:port where the agents of the nodes meet; alone, any free port.

        Several nodes cannot agree on a free port before they have met: it follows from the job that they share.
        """
        return f"{self.first}:{0 if self.nodes == 1 else FIRST_PORT + zlib.crc32(job.encode()) % PORTS}"


def _scontrol(*what: str) -> str:
    return subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, check=True).stdout


def address(node: str) -> str:
    """Of a node of the cluster, whose name need not be one that resolves."""
    said = _scontrol("node", node, "--oneliner").split()
    return next(word.removeprefix("NodeAddr=") for word in said if word.startswith("NodeAddr="))


def agent_of(task: Task, place: Place) -> "LocalElasticAgent":
    """What starts this node's part of the run's processes, and starts them again."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    job = f"{os.environ.get('SLURM_JOB_ID', os.getpid())}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    meeting = RendezvousParameters(
        backend="c10d",
        endpoint=place.meeting_point(job),
        run_id=job,
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        local_addr=place.here,
        join_timeout=MEETING_S,
        is_host=str(place.is_first),
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=per_node(task.num_processes, place.nodes),
        entrypoint=sys.executable,
        args=("-u", "-m", "rlhf_lab.launch.worker", str(task.root), task.digest),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=RESTARTS,
        local_addr=meeting.local_addr,
    )
    return LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs())


def supervised(task: Task) -> int:
    """Do a run with all its processes in the foreground, what it needs included; returns its exit code.

    The launcher is a process of its own, which may hold back signals before it has any thread.

    Raises:
        KeyboardInterrupt: Ctrl-C came once more after a request to stop, which the first one is.
    """
    requests = Requests()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if requests.came:
            raise KeyboardInterrupt
        requests.came.append(signal.SIGTERM)
        print("interrupted; it saves and stops at its next step, and at once if interrupted again", file=sys.stderr)

    before = signal.signal(signal.SIGINT, interrupt)
    requests.listen()
    whole = replace(task, needs=())  # its ranks build what it needs, as a run of one process does
    try:
        return Supervisor(whole, requests, restarts=RESTARTS, limit_s=math.inf).wait()
    finally:
        requests.restore()
        signal.signal(signal.SIGINT, before)


def pass_on(agent: "LocalElasticAgent") -> None:
    """Hand requests to stop to the ranks, for ever; in them they wait until the rank listens.

    Each rank is asked once: a second request could find it at its end, where nothing listens any more.
    """
    asked: set[int] = set()
    while True:
        signal.sigwait(REQUESTS)
        started = {worker.id for worker in agent.get_worker_group().workers if worker.id}
        for rank in started - asked:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(rank, signal.SIGUSR2)
        asked |= started


def run(task: Task) -> int:
    """Do this node's part of the run; returns an exit code of the contract in `rlhf_lab.launch.job`.

    Raises:
        ValueError: its processes do not spread over the nodes.
    """
    agent = agent_of(task, Place.find())
    threading.Thread(target=pass_on, args=(agent,), daemon=True).start()
    ending = task.root / "log" / f"{task.digest}.outcome"
    ending.parent.mkdir(exist_ok=True)
    ending.unlink(missing_ok=True)  # before the nodes have met, and so before any rank can write it
    os.environ[outcome.FILE] = str(ending)
    # a store for each start: in a common one, ranks would look for each other where those before them had been
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # a rank that failed by itself has said so; of one that was killed, only elastic can tell
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(
        lambda record: "exitcode: -" in record.getMessage()
    )
    failures = cast("RunResult", agent.run()).failures  # its decorator hides its type
    agent.get_worker_group().spec.rdzv_handler.shutdown()
    for rank, failure in sorted(failures.items()):
        say(f"rank {rank} ended with exit code {failure.exitcode}")
    return outcome.read(ending)


def main() -> None:
    """Exit with what `run` returns."""
    # blocked and waited for in a thread: the mask is inherited, so that ranks that do not listen yet are not killed
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    root, digest = sys.argv[1:]
    try:
        sys.exit(run(Task.read(Path(root), digest)))
    except ValueError as error:
        say(f"error: {error}")
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
