"""A real SLURM of two nodes on this machine: its daemons, started and stopped by process id.

Everything it writes lies in a folder of its own: configuration, keys, sockets, state, logs. Nothing of a SLURM that
the machine may have is touched. Needs Debian's slurmctld, slurmd, slurm-client and munge, and root, because a daemon
of SLURM starts jobs as their users.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import psutil
from killing import wait_for

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "scancel")
CONFIG = """
ClusterName=scaletrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=20
MinJobAge=3600
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=2 PreemptMode=off
"""


def missing():
    """Why this machine cannot run SLURM; empty where it can."""
    if not Path("/etc/debian_version").exists() or os.geteuid() != 0:
        return "a SLURM is started on Debian, by root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"{', '.join(absent)} missing: apt-get install {' '.join(PACKAGES)}" if absent else ""


def install():
    """Install what is missing, where that can be done."""
    if Path("/etc/debian_version").exists() and os.geteuid() == 0 and missing():
        for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", *command], check=True, stdout=subprocess.DEVNULL)


class Cluster:
    """The daemons and a user's commands; a context that starts them and stops them again."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}
        self._processes = []

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self._processes):  # munged last: the others sign what they say at the end
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for process in self.left():
            process.kill()
        shutil.rmtree(self.folder)

    def _start(self):
        self.folder.chmod(0o755)  # munged is another user
        (self.folder / "state").mkdir()
        host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(host=host, folder=self.folder, ports=free_ports(3), cores=os.cpu_count())
        (self.folder / "slurm.conf").write_text(text)
        munge = self.folder / "munge"
        munge.mkdir()
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        for path in (munge, munge / "key"):
            shutil.chown(path, "munge", "munge")
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        user = {"user": "munge", "group": "munge", "extra_groups": []}
        self._daemon("munged", "--foreground", f"--socket={munge / 'socket'}", *files, **user)
        wait_for((munge / "socket").exists, 20)
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        wait_for(lambda: self.user("sinfo", "-h", "-o", "%D %T", check=False).stdout == "2 idle\n", 60)

    def _daemon(self, *command, **options):
        """Start one, in the foreground: it is this process's child and known by its id."""
        environment = os.environ | self.env
        with (self.folder / f"{command[0]}-{len(self._processes)}.out").open("w") as log:
            process = subprocess.Popen(command, env=environment, cwd="/", stdout=log, stderr=log, **options)
        self._processes.append(process)

    def user(self, *command, check=True, timeout=60, **env):
        """Run a command as a user of the cluster does; returns it with ``stdout`` and ``stderr`` as text."""
        environment = os.environ | self.env | env
        words = [str(word) for word in command]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout, check=check)

    def job(self, number):
        """What SLURM knows of a job: ``JobState``, ``ExitCode``, ``Restarts`` and many more, as text."""
        words = self.user("scontrol", "show", "job", "--oneliner", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def left(self):
        """The processes of jobs that are still there."""
        return [process for process in psutil.process_iter() if of_job(process, self.env["SLURM_CONF"])]


def of_job(process, config):
    """Whether a process was started by a job of the cluster with this configuration, or starts one."""
    try:
        env = {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
        return env.get("SLURM_CONF") == config and ("SLURM_JOB_ID" in env or process.name() == "slurmstepd")
    except psutil.Error:
        return False


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


if __name__ == "__main__":
    install()
