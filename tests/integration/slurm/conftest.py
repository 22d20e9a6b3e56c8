"""A real SLURM cluster of two nodes on one machine, over the loopback device and in a temporary folder.

Tests are skipped without Debian's ``slurm-wlm`` and ``munge``; with GATERA_TEST_INSTALL=1 they are installed,
as root.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from slurm_command import slurm
from system_packages import needs_programs

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")
CONF = """\
ClusterName=gateratest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
SlurmctldPort=16817
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=requeue_setup_env_fail,batch_sched_delay=0,sched_interval=2
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=300
KillWait=20
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=gn1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=gn2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=gn1,gn2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \\
PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=gn1,gn2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two idle nodes, gn1 and gn2, in the partitions main (preemptible) and urgent; sets SLURM_CONF."""
    needs_programs(*TOOLS, packages=("slurm-wlm", "munge"))
    if os.geteuid():
        pytest.skip("only root can start SLURM's daemons")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("spool.gn1", "spool.gn2", "state"):
        (folder / name).mkdir()
    hosts = Path("/etc/hosts").read_text()
    if "gn1" not in hosts:  # SLURMEnvironment takes the first node for the rendezvous
        Path("/etc/hosts").write_text(hosts + "\n127.0.0.1 gn1 gn2\n")
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder))
    _munge()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        slurm("slurmctld", "-i", "-f", str(conf))
        for node in ("gn1", "gn2"):
            slurm("slurmd", "-N", node, "-f", str(conf))
        _wait_for(lambda: slurm("sinfo", "-h", "-p", "main", "-o", "%T %D") == "idle 2", 30)
        try:
            yield folder
        finally:
            subprocess.run(["scancel", "--full", "-u", "root"], capture_output=True)
            for name in ("slurmd.gn1.pid", "slurmd.gn2.pid", "slurmctld.pid"):
                os.kill(int((folder / name).read_text()), signal.SIGTERM)


def _munge():
    for path in ("/run/munge", "/etc/munge", "/etc/munge/munge.key", "/var/log/munge", "/var/lib/munge"):
        if path == "/run/munge":
            Path(path).mkdir(exist_ok=True)
        shutil.chown(path, "munge", "munge")
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True).returncode:
        slurm("runuser", "-u", "munge", "--", "/usr/sbin/munged", "--pid-file=/run/munge/munged.pid")


def _wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


@pytest.fixture
def wait_for():
    """``wait_for(condition, seconds)`` raises AssertionError if the condition does not come true."""
    return _wait_for
