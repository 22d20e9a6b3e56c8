"""A launcher that does not fit the trainer's settings ends every rank at once, with one message."""

import os
import socket
from types import SimpleNamespace

import pytest
from launched_ranks import (
    SHARDED,
    TWO,
    assert_refused,
    free_port,
    is_launcher_variable,
    srun_environment,
    torchrun_environment,
)
from tiny_backbone import tiny_args

from gatera_lightning.cli.main import main
from gatera_lightning.distributed.launch import check_rank_count, check_started_by_srun, started_by_slurm
from gatera_lightning.errors import ConfigError

# --- the number of ranks ---


@pytest.mark.slow
def test_fit_refuses_more_devices_than_slurm_started(launch):
    ended = launch(*((["--trainer.devices", "3"], srun_environment(rank)) for rank in (0, 1)))
    accepted = "accepted: --trainer.devices 2 --trainer.num_nodes 1"
    assert_refused(ended, "trainer.devices: 3", "SLURM started 2 ranks", accepted)


@pytest.mark.slow
def test_fit_refuses_fewer_devices_than_torchrun_started_inside_slurm(launch, tmp_path):
    """With ``devices: 1``, which is quickstart's, these would be two runs in one folder."""
    before = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    before += ["--redirects", "3", "--log-dir", str(tmp_path / "logs")]
    ((status, _),) = launch(([], srun_environment(ranks=1)), before=before)
    assert status != 0
    errors = [path.read_text() for path in sorted((tmp_path / "logs").rglob("stderr.log"))]
    messages = ("trainer.devices: 1", "started 2 ranks", "--trainer.devices 2 --trainer.num_nodes 1")
    assert len(errors) == 2
    assert_refused([(2, error) for error in errors], *messages)


@pytest.mark.parametrize(
    ("environment", "nodes", "devices"),
    [
        (srun_environment(), 1, 1),
        (srun_environment(), 2, 1),
        (srun_environment(), 2, 2),
        (srun_environment(SLURM_NNODES="2", SLURM_NTASKS="4"), 1, 4),
        (torchrun_environment(0, "1"), 1, 1),
        (torchrun_environment(0, "1"), 2, 1),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 1, 3),
    ],
)
def test_check_rank_count_accepts_what_its_error_proposes(monkeypatch, environment, nodes, devices):
    for name in filter(is_launcher_variable, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="accepted: ") as refusal:
        check_rank_count(SimpleNamespace(num_nodes=nodes, num_devices=devices))
    assert refusal.value.on_every_rank
    *_, devices, _, nodes = str(refusal.value).split()
    check_rank_count(SimpleNamespace(num_nodes=int(nodes), num_devices=int(devices)))


@pytest.mark.slow
def test_fit_refuses_ntasks_without_ntasks_per_node(launch):
    environment = srun_environment()
    del environment["SLURM_NTASKS_PER_NODE"]
    assert_refused(launch((TWO, environment)), "--ntasks-per-node=2")


@pytest.mark.slow
def test_fit_refuses_slurm_job_without_srun(launch):
    """It would wait for another task, which nobody starts."""
    environment = srun_environment()
    del environment["SLURM_STEP_ID"]
    assert_refused(launch((TWO, environment)), "SLURM_NTASKS: 2", "without srun; accepted: srun python -m")


def test_check_started_by_srun_accepts_interactive_shell(monkeypatch):
    for name, value in srun_environment(SLURM_JOB_NAME="interactive").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID")
    assert not started_by_slurm()
    check_started_by_srun()


# --- the strategy ---


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (["--replicate_size", "3"], "trainer.strategy.replicate_size: 3 does not divide the 2 ranks"),
        (
            ["--replicate_size", "2", "--shard_size", "2"],
            "replicate_size 2 × shard_size 2 is 4, but there are 2 ranks",
        ),
        (["--shard_size", "1"], "replicate_size 1 × shard_size 1 is 1, but there are 2 ranks"),
        (["--shard_size", "0"], "trainer.strategy.shard_size: 0"),
    ],
)
def test_fit_refuses_mesh_that_does_not_fit_the_ranks(tiny_backbone, capsys, sizes, message):
    flags = [flag.replace("--", "--trainer.strategy.init_args.") for flag in sizes]
    args = ["fit", "--config", "quickstart.yaml", *SHARDED, *tiny_args(tiny_backbone), *TWO, *flags]
    assert main([*args, "--print_config"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "accepted: " in error


@pytest.mark.slow
def test_fit_refuses_mesh_when_the_machine_decides_the_number_of_ranks(launch):
    """On a CPU ``auto`` is 1."""
    flags = ["--trainer.devices", "auto", "--trainer.strategy.init_args.replicate_size", "2"]
    message = "trainer.strategy.replicate_size: 2 does not divide the 1 ranks (nodes × devices)"
    assert_refused(launch(([*SHARDED, *flags], {})), message)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp", "trainer.strategy: 'fsdp' is FSDP1"),
        ("fsdp_cpu_offload", "trainer.strategy: 'fsdp_cpu_offload' is FSDP1"),
        (
            '{"class_path": "lightning.pytorch.strategies.FSDPStrategy"}',
            "trainer.strategy: 'FSDPStrategy' is FSDP1",
        ),
        (
            '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}',
            "trainer.strategy: 'ModelParallelStrategy'",
        ),
    ],
)
def test_fit_refuses_other_sharding_strategies(tiny_backbone, capsys, strategy, message):
    args = ["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), *TWO]
    assert main([*args, "--trainer.strategy", strategy, "--print_config"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "accepted: auto, ddp, or --config overlays/fsdp.yaml (FSDP2" in error


@pytest.mark.slow
def test_fit_refuses_unknown_strategy(launch):
    messages = ("trainer.strategy: 'nonsense' is unknown; accepted: auto, ddp, ",)
    assert_refused(launch(([*TWO, "--trainer.strategy", "nonsense"], {})), *messages)


# --- the rendezvous ---


@pytest.mark.slow
def test_fit_reports_port_in_use(launch):
    """Rank 1, which rank 0 has started, would go on asking whoever uses the port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = launch((TWO, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}))
    message = f"rendezvous failed at 127.0.0.1, port {port}"
    assert_refused(ended, message, "set MASTER_PORT to a free one", status=1)
