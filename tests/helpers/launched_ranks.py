"""Start ranks as torchrun and srun do, and compare how they end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

from tiny_backbone import tiny_args

LAUNCHER_PREFIXES = ("SLURM_", "TORCHELASTIC_", "MASTER_", "PL_")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SHARDED = ["--config", "overlays/fsdp.yaml"]
TWO = ["--trainer.devices", "2"]


def is_launcher_variable(name):
    return name.startswith(LAUNCHER_PREFIXES) or name in LAUNCHER_VARIABLES


def free_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        return str(other.getsockname()[1])


def torchrun_environment(rank, port, ranks=2):
    """The variables that torchrun sets, on one node."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)),
        **{"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"},
    }


def srun_environment(rank=0, ranks=2, **other):
    """The variables that srun sets, on one node."""
    return {
        **{"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1", "SLURM_NODEID": "0"},
        **dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"), str(ranks)),
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(rank)),
        **other,
    }


class Launcher:
    """Starts ``fit --config quickstart.yaml`` with arguments and environment variables of each rank's own."""

    def __init__(self, backbone, folder):
        self.backbone, self.folder = backbone, folder

    def __call__(self, *ranks, before=()):
        """Run ranks, each given as (arguments, environment), to their end.

        Processes that a rank starts write to its pipe, which ends when all of them have.

        Returns:
            The exit status and the standard error of each rank.
        """
        started = [self._start(args, environment, before) for args, environment in ranks]
        try:
            outputs = [process.communicate(timeout=120) for process in started]
            return [(process.returncode, error) for process, (_, error) in zip(started, outputs, strict=True)]
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def two(self, args, first, second):
        """Run two ranks as torchrun would start them, each with arguments of its own."""
        port = free_port()
        ranks = enumerate((first, second))
        return self(*(([*TWO, *args, *own], torchrun_environment(rank, port)) for rank, own in ranks))

    def _start(self, args, environment, before):
        inherited = {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}
        program = [*before, "-m", "gatera_lightning", "fit", "--config", "quickstart.yaml"]
        settings = [*tiny_args(self.backbone), "--trainer.limit_val_batches", "0", *args]
        return subprocess.Popen(
            [sys.executable, *program, *settings],
            cwd=self.folder,
            env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def assert_refused(ended, *messages, status=2):
    """All ranks ended with the status; rank 0 printed each message once, and no other rank printed any."""
    assert [code for code, _ in ended] == [status] * len(ended), ended
    assert "Traceback" not in "".join(error for _, error in ended)
    first, *others = (error for _, error in ended)
    for text in messages:
        assert first.count(text) == 1, first
        assert text not in "".join(others)
    assert first.count("python -m gatera_lightning: ") == 1
    assert "python -m gatera_lightning" not in "".join(others)
