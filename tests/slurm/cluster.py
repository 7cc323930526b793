"""A Slurm of two nodes on this machine, for as long as a ``with`` block lasts.

    with slurm_cluster(ClusterOptions()) as cluster:
        job = cluster.submit("--wrap", "hostname")
        cluster.wait_for(job, "COMPLETED", timeout_s=20)

Configuration, keys, sockets, state and logs lie in one temporary folder; all ports are on the loopback interface and
chosen at run time, so that several clusters can run at once. Commands of Slurm find a cluster by the environment
variable SLURM_CONF in ``cluster.environment``; nothing is set globally.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.conftest import cannot_run
from tests.integration.launching import environment
from tests.slurm.reaper import environment_of, parent_of, processes_of
from tests.slurm.settings import GPUS, NODES, ClusterOptions, slurm_conf, slurmdbd_conf

_REAPER = Path(__file__).with_name("reaper.py")
_SYSTEM = "/usr/sbin:/sbin"  # Debian keeps the daemons there, and not every user's PATH has it
_DAEMONS = ("munged", "slurmctld", "slurmd")
_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
ASK_EVERY_S = 0.3  # to ask Slurm takes 10 ms of processor time, of which jobs have too little
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"}


def require_slurm(options: ClusterOptions | None = None) -> None:
    """Skip the test where no cluster can be started."""
    programs = (*_DAEMONS, *(_ACCOUNTING if options and options.accounting else ()))
    if missing := [name for name in programs if shutil.which(name, path=_path()) is None]:
        packages = "slurm-wlm munge slurmdbd mariadb-server"
        cannot_run(f"Slurm's {', '.join(missing)} cannot be found: apt-get install {packages}", without="slurm")
    if os.geteuid() != 0:
        cannot_run("A Slurm of one's own needs root.", without="slurm")


@contextmanager
def slurm_cluster(options: ClusterOptions) -> Iterator[Cluster]:
    """Start a cluster; end it and everything that runs on it when the block ends, even if starting failed.

    Raises:
        TimeoutError: a daemon did not come up; its log is in the message.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o711)  # munged wants its socket reachable by all
    reaper = subprocess.Popen([sys.executable, "-I", str(_REAPER), str(folder)], stdin=subprocess.PIPE)
    assert reaper.stdin is not None
    cluster = Cluster(folder, options)
    try:
        cluster.start()
        yield cluster
    finally:
        reaper.stdin.close()
        assert reaper.wait(timeout=30) == 0, f"The cluster in {folder} did not end."
        cluster.reap()


class Cluster:
    """A running cluster; ``environment`` is for every command that shall talk to it."""

    def __init__(self, folder: Path, options: ClusterOptions) -> None:
        self.folder, self.options = folder, options
        self.conf = folder / "slurm.conf"
        self.environment = {**environment(), "SLURM_CONF": str(self.conf), "PATH": _path()}
        self._ports = _free_ports()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # Starting and ending

    def start(self) -> None:
        """Write the configuration and start all daemons; returns when both nodes are idle."""
        self._write_configuration()
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in munge.items()]
        self._daemon("munged", "--foreground", "--force", *files)
        self._until((self.folder / "munge.socket").exists, "munged")
        if self.options.accounting:
            self._start_accounting()
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self._start_node(node)
        nodes = [f"slurmd-{node}" for node in NODES]
        self._until(lambda: self.node_states() == dict.fromkeys(NODES, "IDLE"), "slurmctld", *nodes)

    def _write_configuration(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self.conf.write_text(slurm_conf(self.folder, self._ports, self.options))
        gpus = [self.folder / f"gpu{index}" for index in range(GPUS)]
        for gpu in gpus:
            gpu.touch()  # a record without a file counts as no GPU; any file will do where no cgroup guards devices
        records = [f"NodeName={node} Name=gpu File={gpu}" for node in NODES for gpu in gpus]
        (self.folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *records, ""]))

    def _start_node(self, node: str) -> None:
        self._daemon(f"slurmd-{node}", "-D", "-N", node)

    def _start_accounting(self) -> None:
        data, database_socket = self.folder / "database", self.folder / "mysqld.sock"
        self.environment["MYSQL_UNIX_PORT"] = str(database_socket)
        data.mkdir()  # its temporary files too: in a shared place those of two data bases have the same names
        private = ("--no-defaults", f"--datadir={data}", f"--tmpdir={data}", "--user=root")
        self.run("mariadb-install-db", *private, "--auth-root-authentication-method=normal", "--skip-test-db")
        self._daemon("mariadbd", *private, f"--socket={database_socket}", "--skip-networking", "--skip-log-bin")
        self._until(database_socket.exists, "mariadbd")
        conf = self.folder / "slurmdbd.conf"
        conf.touch(mode=0o600)
        conf.write_text(slurmdbd_conf(self.folder, self._ports[1]))
        self._daemon("slurmdbd", "-D")
        self._until(lambda: _listens(self._ports[1]), "slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", "test")
        self.run("sacctmgr", "-i", "add", "account", "test", "cluster=test")
        self.run("sacctmgr", "-i", "add", "user", "root", "account=test")

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                [name.partition("-")[0], *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # an interrupt at the keyboard is the test's, not the daemons'
            )

    def _until(self, condition: Callable[[], bool], *names: str, timeout_s: float = 30) -> None:
        """Wait for a daemon to come up."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name in names if self._daemons[name].poll() is not None]
            if dead or time.monotonic() > deadline:
                said = "\n".join(f"{name}: {self.log(name)}" for name in names)
                raise TimeoutError(f"{', '.join(dead or names)} did not come up.\n{said}")
            time.sleep(0.05)

    def log(self, name: str) -> str:
        """The last lines of a daemon's output and log: ``slurmctld``, ``slurmd-n1``, …"""
        paths = [path for path in (self.folder / f"{name}.out", self.folder / f"{name}.log") if path.exists()]
        return "\n".join(line for path in paths for line in path.read_text().splitlines()[-30:])

    def reap(self) -> None:
        """Take note of the daemons' ends, so that no process is left unwaited for."""
        for daemon in self._daemons.values():
            daemon.wait(timeout=10)

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """End slurmctld for as long as the block lasts: the scheduler cannot be reached, and jobs run on.

        It saves its state first. Killed, it would have forgotten the last five seconds, and started jobs again that
        were cancelled in them.
        """
        self._daemons["slurmctld"].terminate()
        self._daemons["slurmctld"].wait(timeout=60)
        try:
            yield
        finally:
            self._daemon("slurmctld", "-D")
            self._until(lambda: self.try_run("scontrol", "ping").returncode == 0, "slurmctld")

    # Commands

    def try_run(self, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster to its end."""
        env = {**self.environment, **(environment or {})}
        return subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=60, cwd=self.folder
        )

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command that must succeed; returns its standard output, without the last newline."""
        done = self.try_run(*command, environment=environment)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.rstrip("\n")

    def submit(self, *arguments: str) -> str:
        """``sbatch`` with these arguments; returns the job's number."""
        return self.run("sbatch", "--parsable", *arguments).partition(";")[0]

    # Jobs

    def show(self, job_id: str) -> dict[str, str]:
        """The fields of ``scontrol show job``; empty if the controller does not know the job."""
        done = self.try_run("scontrol", "show", "job", "-o", job_id)
        if "not found" in done.stdout:  # elements that are cancelled one by one while they wait become their array
            done = self.try_run("scontrol", "show", "job", "-o", job_id.partition("_")[0])
        first = done.stdout.partition("\n")[0] if done.returncode == 0 else ""
        return dict(part.split("=", 1) for part in first.split() if "=" in part)

    def state(self, job_id: str) -> str:
        """``PENDING``, ``RUNNING``, …; ``UNKNOWN`` if the controller does not know the job."""
        return self.show(job_id).get("JobState", "UNKNOWN")

    def queue(self) -> str:
        """``squeue`` of all jobs, one line each, arrays expanded, finished ones included."""
        return self.run("squeue", "-r", "-t", "all", "-o", "%i %j %T %r %M %N")

    def wait_for(self, job_id: str, *states: str, timeout_s: float = 120) -> str:
        """Wait until a job is in one of these states and return it; fails with the queue if it ends in another one."""

        def arrived() -> bool:
            state = self.state(job_id)
            if state in _OVER and state not in states:
                raise AssertionError(f"Job {job_id} is {state}, not {' or '.join(states)}.\n{self.queue()}")
            return state in states

        message = f"Job {job_id} is not {' or '.join(states)}.\n"
        wait_until(arrived, timeout_s, lambda: message + self.queue(), every_s=ASK_EVERY_S)
        return self.state(job_id)

    def preempt(self, job_id: str, *, timeout_s: float = 120) -> None:
        """Take the nodes of a running job away by a job of higher priority, until it waits in the queue again."""
        nodes = self.show(job_id)["NumNodes"]
        name = f"before-{job_id}"
        hold = ("-p", "high", "--exclusive", "-N", nodes, "-J", name, "-o", "/dev/null", "--wrap", "exec sleep 600")
        thief = self.submit(*hold)
        try:
            self.wait_for(job_id, "PENDING", timeout_s=timeout_s)
            self.wait_for(thief, "RUNNING", timeout_s=timeout_s)
        finally:
            self.run("scancel", thief)
        self.wait_for(thief, "CANCELLED", "COMPLETED", timeout_s=timeout_s)

    def release_begin_time(self, job_id: str) -> None:
        """Let a requeued job start at once; Slurm makes it wait for two minutes."""
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def tasks(self, job_id: str, rank: int | None = None) -> list[int]:
        """Numbers of the processes that run for a job, or for one rank of its steps; the oldest first."""
        found = []
        for pid in processes_of(self.conf):
            own = environment_of(pid)
            if own.get("SLURM_JOB_ID") != job_id or "SLURMD_NODENAME" not in own:
                continue
            if rank is None or ("SLURM_STEP_ID" in own and own.get("SLURM_PROCID") == str(rank)):
                found.append(pid)
        return sorted(found)

    # Nodes

    def node_states(self) -> dict[str, str]:
        """``{"n1": "IDLE", …}``; empty while the controller does not answer."""
        done = self.try_run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T")
        pairs = [line.split() for line in done.stdout.splitlines()] if done.returncode == 0 else []
        return {name: state.upper() for name, state in pairs}

    def node_down(self, node: str) -> None:
        """Lose a node as by a power cut: all its processes end at once, and the controller is told so.

        (Left to itself the controller takes SlurmdTimeout, five minutes, to notice.)
        """
        daemon = self._daemons[f"slurmd-{node}"]
        daemon.kill()
        daemon.wait()
        running = set(processes_of(self.conf))
        tasks = {pid for pid in running if environment_of(pid).get("SLURMD_NODENAME") == node}
        # All of Slurm's own first. Some tasks are parents too, the batch script is; and a slurmstepd that outlives it
        # reports that a signal ended it: the job has then failed (JobLaunchFailure) and is not requeued.
        supervisors = ({parent_of(pid) for pid in tasks} - tasks) & running
        for pid in [*supervisors, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def node_up(self, node: str) -> None:
        """Start a lost node again."""
        self._start_node(node)
        self._until(lambda: self.node_states()[node] in ("IDLE", "MIXED", "ALLOCATED"), f"slurmd-{node}")


def wait_until(
    condition: Callable[[], bool], timeout_s: float, otherwise: Callable[[], str], *, every_s: float = 0.1
) -> None:
    """Wait for a condition, looking every so many seconds; ``otherwise`` says what is there instead of it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(otherwise())
        time.sleep(every_s)


def _path() -> str:
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:{_SYSTEM}"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports() -> list[int]:
    """Four ports that nobody uses, below those that the system gives to outgoing connections."""
    found: list[int] = []
    while len(found) < 4:
        port = random.SystemRandom().randrange(12000, 30000)
        if port not in found and not _listens(port):
            found.append(port)
    return found
