"""Check that srun or torchrun started as many ranks as the trainer expects."""

import os

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from gatera_lightning.errors import ConfigError


def started_by_slurm() -> bool:
    """Return whether this process is a SLURM task, and not one that torchrun started inside a SLURM task."""
    return not TorchElasticEnvironment.detect() and SLURMEnvironment.detect()


def check_started_by_srun() -> None:
    """Refuse a SLURM job with several tasks in which this process was not started by srun.

    It would wait forever for the other tasks, which nothing starts.

    Raises:
        ConfigError: SLURM_NTASKS is above 1 and srun was not used.
    """
    if started_by_slurm() and "SLURM_STEP_ID" not in os.environ and os.environ["SLURM_NTASKS"] != "1":
        raise ConfigError(
            f"SLURM_NTASKS: {os.environ['SLURM_NTASKS']}, but this process was started without srun; "
            "accepted: srun python -m gatera_lightning …, or SLURM_JOB_NAME=interactive if you "
            "start the ranks yourself"
        )


def check_rank_count(trainer: L.Trainer) -> None:
    """Refuse a launcher that started another number of ranks than the trainer expects.

    The ranks would wait for others that do not exist, or each would train alone.

    Raises:
        ConfigError: The numbers differ; the message gives the flags that fit the launcher.
    """
    environment = os.environ
    if started_by_slurm():
        launcher = "SLURM"
        ranks = int(environment["SLURM_NTASKS"])
        nodes = int(environment.get("SLURM_NNODES", trainer.num_nodes))
    elif "LOCAL_RANK" in environment and "WORLD_SIZE" in environment:
        launcher = "torchrun (WORLD_SIZE)"
        ranks = int(environment["WORLD_SIZE"])
        nodes = trainer.num_nodes
        if "LOCAL_WORLD_SIZE" in environment:
            nodes = ranks // int(environment["LOCAL_WORLD_SIZE"])
    else:
        return  # Lightning starts the other ranks itself
    if (trainer.num_nodes, trainer.num_nodes * trainer.num_devices) != (nodes, ranks):
        raise ConfigError(
            f"trainer.devices: {trainer.num_devices}, trainer.num_nodes: {trainer.num_nodes}; {launcher} "
            f"started {ranks} ranks on {nodes} nodes; accepted: --trainer.devices {ranks // nodes} "
            f"--trainer.num_nodes {nodes}",
            on_every_rank=True,
        )
