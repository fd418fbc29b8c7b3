"""A real SLURM cluster on this machine alone, to test against: several nodes, pretended GPUs, accounting, no systemd.

    python tests/slurm/cluster.py start                # installs the Debian packages that are missing; 25 s, later 3 s
    eval "$(python tests/slurm/cluster.py env)"        # what sbatch, squeue and sacct need to find it
    python tests/slurm/cluster.py status               # its daemons, nodes and jobs
    python tests/slurm/cluster.py stop                 # ends its jobs and daemons; start keeps its history
    python tests/slurm/cluster.py purge                # stop, and delete its folder

Every daemon listens on 127.0.0.1 (but slurmdbd, which has no such setting) and on ports of its own, so that clusters in
different folders (--root) live side by side. Only processes that it started itself are ever ended. Needs Python alone.
"""

import argparse
import fcntl
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

PROGRAMS = {  # what is run -> the Debian package that holds it
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sbatch": "slurm-client",
    "mariadbd": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
}
LONGEST_SOCKET = 107  # bytes of a unix socket's path
UNAVAILABLE = 3


class Unavailable(RuntimeError):
    """This machine cannot have such a cluster; says what is missing."""


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def birth(pid: int) -> str:
    """When the process began, in clock ticks since the machine started; '' if it has ended (a zombie has)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def missing_packages() -> list[str]:
    """The Debian packages whose programs are not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None]


def install() -> None:
    """Install the missing packages, without starting what they install.

    Raises:
        Unavailable: not a Debian, or its packages cannot be had.
    """
    packages = missing_packages()
    if not packages:
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"no apt-get to install {' '.join(packages)} with; install SLURM and MariaDB by other means")
    print(f"apt-get install {' '.join(packages)}", flush=True)
    policy = Path("/usr/sbin/policy-rc.d")  # what packages ask whether they may start daemons; images may have one
    with tempfile.NamedTemporaryFile("w", dir=policy.parent) as ours:
        ours.write("#!/bin/sh\nexit 101\n")
        ours.flush()
        os.chmod(ours.name, 0o755)
        made = not policy.exists()
        if made:
            os.link(ours.name, policy)
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run([*apt, *arguments], env=environment, capture_output=True, text=True, check=False)
    finally:
        if made:
            policy.unlink()
    if left := missing_packages():
        raise Unavailable(f"apt-get did not install {' '.join(left)}: {done.stderr.strip()[-500:]}")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on, below those that the kernel gives to clients."""
    held: list[socket.socket] = []
    while len(held) < count:
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
        except OSError:
            one.close()
            continue
        held.append(one)
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster, running or not; everything of it is in `root`.

    Fields:
        root: absolute; deleted by `purge`.
        ports: of slurmctld, of slurmdbd, then of each node's slurmd.
        cpus, gpus: of each node, pretended. Memory is the machine's, divided.
    """

    root: Path
    nodes: int
    cpus: int
    gpus: int
    ports: tuple[int, ...]

    @classmethod
    def read(cls, root: Path) -> "Cluster":
        """The cluster that was made in `root`.

        Raises:
            ValueError: there is none.
        """
        try:
            settings = json.loads((root / "cluster.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"no cluster in {root}; make one with: python tests/slurm/cluster.py start") from None
        return cls(root=root.resolve(), **(settings | {"ports": tuple(settings["ports"])}))

    @classmethod
    def make(cls, root: Path, nodes: int, cpus: int, gpus: int) -> "Cluster":
        """Write the configuration of a new cluster, or take the one that is there, with its settings.

        Raises:
            Unavailable: not root, no device files can be made, or the folder's name is too long.
            ValueError: no GPU, or a folder above it is closed to other users.
        """
        root = root.resolve()
        if os.geteuid() != 0:
            raise Unavailable("needs root: SLURM's daemons start jobs as the users who submit them")
        if gpus < 1:
            raise ValueError(f"--gpus {gpus}: a node needs at least one, as SLURM refuses devices that do not exist")
        if len(str(root / "munge/socket.lock")) > LONGEST_SOCKET:
            raise Unavailable(f"{root} is too long a name for a socket; choose a shorter --root")
        closed = [folder for folder in root.parents if not folder.stat().st_mode & stat.S_IXOTH]
        if closed:
            raise ValueError(f"munge needs folders that all users may enter: chmod o+x {closed[0]}, or another --root")
        if (root / "cluster.json").exists():
            return cls.read(root)
        cluster = cls(root=root, nodes=nodes, cpus=cpus, gpus=gpus, ports=tuple(free_ports(2 + nodes)))
        cluster._write()
        return cluster

    @property
    def conf(self) -> Path:
        """What SLURM_CONF has to name."""
        return self.root / "slurm.conf"

    @property
    def names(self) -> list[str]:
        """Of the nodes."""
        return [f"lab{i}" for i in range(self.nodes)]

    @property
    def environment(self) -> dict[str, str]:
        """This process's, for a client of this cluster."""
        return {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            "MYSQL_UNIX_PORT": str(self.root / "database.socket"),  # where slurmdbd looks for localhost's database
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        }

    def ask(self, *command: str) -> str:
        """The output of one of SLURM's programs.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def answers(self, *command: str) -> bool:
        """Whether the program succeeds now."""
        try:
            self.ask(*command)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return True

    def start(self) -> None:
        """Start every daemon that does not run; done when all nodes take jobs.

        Raises:
            RuntimeError: a daemon did not come up; with the end of its log.
        """
        path = self.root
        with self._alone():
            munge = [f"--{what}={path}/munge/{what.partition('-')[0]}" for what in ("socket", "key-file", "seed-file")]
            munge += [f"--pid-file={path}/munge/pid", f"--log-file={path}/log/munge"]
            self._daemon("munged", ["munged", "--foreground", *munge], (path / "munge/socket").exists)
            if not (path / "database").exists():
                make = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={path}/database.new"]
                make += ["--skip-test-db", "--auth-root-authentication-method=socket"]
                self.ask(*make)
                (path / "database.new").rename(path / "database")
            store = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={path}/database", "--skip-networking"]
            store += [f"--socket={path}/database.socket", f"--pid-file={path}/database.pid"]
            store += ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
            self._daemon("mariadbd", store, lambda: self._listens(path / "database.socket"))
            self._daemon("slurmdbd", ["slurmdbd", "-D"], lambda: self.answers("sacctmgr", "-n", "show", "cluster"))
            if not self.ask("sacctmgr", "-n", "show", "cluster"):
                self.ask("sacctmgr", "-i", "add", "cluster", "lab")
            self._daemon("slurmctld", ["slurmctld", "-D"], lambda: self.answers("scontrol", "ping"))
            for name in self.names:
                (path / "spool" / name).mkdir(exist_ok=True)
                self._daemon(f"slurmd.{name}", ["slurmd", "-D", "-N", name], lambda: True)
            if not wait_until(self._ready, 60):
                raise RuntimeError(f"nodes that take no jobs: {self.ask('sinfo', '-N', '-o', '%N %T %E')}")

    def stop(self) -> None:
        """End all jobs, then every daemon."""
        with self._alone():
            if any(self.pid_of(f"slurmd.{name}") for name in self.names):
                # jobs outlive the daemons: only the controller can end them
                self._daemon("slurmctld", ["slurmctld", "-D"], lambda: self.answers("scontrol", "ping"))
                if jobs := self.ask("squeue", "-h", "-a", "-o", "%A").split():
                    self.ask("scancel", *sorted(set(jobs)))
                if not wait_until(lambda: not self.ask("squeue", "-h", "-a"), 60):
                    print(f"jobs that did not end: {self.ask('squeue', '-h', '-a')}", file=sys.stderr)
            for name in reversed(self.daemons()):
                self.end(name)

    def purge(self) -> None:
        """Stop, and leave nothing behind but the installed packages."""
        self.stop()
        hosts = Path("/etc/hosts")
        with self._alone(hosts):
            kept = [line for line in hosts.read_text().splitlines() if not line.endswith(self._mark)]
            hosts.write_text("\n".join(kept) + "\n")  # in place: it may be a mount
        shutil.rmtree(self.root)

    def daemons(self) -> list[str]:
        """Those that were started, in that order, whether or not they live."""
        notes = sorted((self.root / "pids").iterdir(), key=lambda note: note.stat().st_mtime_ns)
        return [note.name for note in notes]

    def pid_of(self, daemon: str) -> int | None:
        """Of one of our own daemons; None when it does not run."""
        note = self.root / "pids" / daemon
        if not note.exists():
            return None
        pid, _, born = note.read_text().partition(" ")  # not born: it had ended before it could be asked
        return int(pid) if born and birth(int(pid)) == born else None

    def end(self, daemon: str, *, kill: bool = False) -> None:
        """End one of our own daemons: kindly and, after 20 s or if `kill`, by SIGKILL."""
        pid = self.pid_of(daemon)
        if pid is not None and not kill:
            os.kill(pid, 15)
            wait_until(lambda: self.pid_of(daemon) is None, 20)
        if (pid := self.pid_of(daemon)) is not None:
            os.kill(pid, 9)
            wait_until(lambda: self.pid_of(daemon) is None, 20)
        (self.root / "pids" / daemon).unlink(missing_ok=True)

    @property
    def _mark(self) -> str:
        return f"# {self.root}"

    @contextmanager
    def _alone(self, path: Path | None = None) -> Iterator[None]:
        """One process at a time changes this cluster, or the file `path`."""
        with (path or self.conf).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _daemon(self, name: str, command: list[str], up: Callable[[], bool]) -> None:
        """Start a daemon in the foreground of a session of its own, and note its pid and time of birth."""
        if self.pid_of(name) is not None:
            return
        log = self.root / "log" / f"{name}.out"
        with log.open("a") as out:
            daemon = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        (self.root / "pids" / name).write_text(f"{daemon.pid} {birth(daemon.pid)}")
        if not wait_until(lambda: daemon.poll() is not None or up(), 60) or daemon.poll() is not None:
            raise RuntimeError(f"{name} did not come up; the end of {log}:\n{log.read_text()[-1500:]}")

    def _ready(self) -> bool:
        states = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
        return len(states) == self.nodes and all(state in ("idle", "mixed", "allocated") for state in states)

    @staticmethod
    def _listens(path: Path) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(path)) == 0

    def _write(self) -> None:
        """The folder of a new cluster, its devices and its configuration; `cluster.json` last."""
        for folder in ("pids", "log", "munge", "state", "spool", "gpu"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        for folder in (self.root, self.root / "munge"):  # jobs of other users read the configuration and ask munge
            folder.chmod(0o755)
        key = self.root / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        for i in range(self.gpus):
            try:
                # SLURM counts plain files as GPUs, but sets CUDA_VISIBLE_DEVICES only for devices; twins of /dev/null
                os.mknod(self.root / f"gpu/{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            except (PermissionError, FileExistsError) as error:
                if isinstance(error, PermissionError):
                    raise Unavailable(f"no device file can be made in {self.root}: {error.strerror}") from error
        hosts = Path("/etc/hosts")
        with self._alone(hosts), hosts.open("a") as out:  # jobs look for each other by the names of their nodes
            out.write(f"127.0.0.1 {' '.join(self.names)} {self._mark}\n")
        (self.root / "slurm.conf").write_text(self._slurm_conf())
        (self.root / "gres.conf").write_text(f"Name=gpu Type=fake File={self.root}/gpu/[0-{self.gpus - 1}]\n")
        database = self.root / "slurmdbd.conf"
        database.touch(0o600)
        database.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self.root}/munge/socket\nSlurmUser=root\n"
            f"DbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={self.ports[1]}\nPidFile={self.root}/state/slurmdbd.pid\n"
            "StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser=root\nStorageLoc=slurm\n"
        )
        settings = {key: value for key, value in asdict(self).items() if key != "root"}
        (self.root / "cluster.json").write_text(json.dumps(settings))

    def _slurm_conf(self) -> str:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 9 // 10 // self.nodes
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            f"RealMemory={memory} Gres=gpu:fake:{self.gpus} State=UNKNOWN"
            for name, port in zip(self.names, self.ports[2:], strict=True)
        )
        return f"""\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={self.ports[0]}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credential has expired: 10 s, not 120
AuthInfo=socket={self.root}/munge/socket,cred_expire=10
StateSaveLocation={self.root}/state
SlurmdSpoolDir={self.root}/spool/%n
SlurmctldPidFile={self.root}/state/slurmctld.pid
SlurmdPidFile={self.root}/spool/%n.pid
SlurmctldLogFile={self.root}/log/slurmctld
SlurmdLogFile={self.root}/log/slurmd.%n
MpiDefault=none
# no cgroups: a process is a job's if its parent is
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
# ends a job that uses more memory than it asked for
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory // self.cpus}
GresTypes=gpu
# a node may have more CPUs than the machine
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=5
# what has ended stays in squeue and scontrol for an hour
MinJobAge=3600
# what can never run is refused at submission, and does not wait for ever
EnforcePartLimits=ALL
SchedulerType=sched/backfill
# a requeued job is looked at every 2 s, not every 60
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5
# a job in `high` takes the place of one in `main`, which gets its --signal, the grace time, and is requeued
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={self.ports[1]}
AccountingStoragePass={self.root}/munge/socket
AccountingStorageTRES=gres/gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def main() -> None:
    """The command line; exit code 3 where this machine cannot have a cluster."""
    parser = argparse.ArgumentParser(description="A SLURM cluster on this machine alone, for tests.")
    parser.add_argument("action", choices=["start", "stop", "status", "purge", "env"])
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lab-slurm", help="its folder")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=4, help="of each node, pretended")
    parser.add_argument("--gpus", type=int, default=4, help="of each node, pretended; at least 1")
    typed = parser.parse_args()
    try:
        if typed.action == "start":
            install()
            cluster = Cluster.make(typed.root, typed.nodes, typed.cpus, typed.gpus)
            cluster.start()
            print(cluster.ask("sinfo", "-h", "-o", "%P: %D nodes of %c CPUs, %m MB, %G"))
            print(f"export SLURM_CONF={cluster.conf}")
            return
        cluster = Cluster.read(typed.root)
        if typed.action == "env":
            print(f"export SLURM_CONF={cluster.conf}")
        elif typed.action == "status":
            for daemon in cluster.daemons():
                print(daemon, cluster.pid_of(daemon) or "ended")
            print(cluster.ask("sinfo", "-N", "-l"), cluster.ask("squeue", "-a"), sep="\n")
        else:
            {"stop": cluster.stop, "purge": cluster.purge}[typed.action]()
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(UNAVAILABLE if isinstance(error, Unavailable) else 1)


if __name__ == "__main__":
    main()
