"""A run whose processes cannot work together ends at once: every process, with one message, on the first, and no stack."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_backbone import sample_rows, tiny_args

import gatera_lightning.cli.main
from gatera_lightning import AdapterConfig, BackboneConfig
from gatera_lightning.cli.main import main
from gatera_lightning.distributed import sharded_loading
from gatera_lightning.distributed.consistency import (
    refuse_other_number,
    refuse_without_srun,
    started_by_slurm,
)
from gatera_lightning.errors import ConfigError

LAUNCHED = ("SLURM_", "TORCHELASTIC_", "MASTER_", "PL_")
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SHARDED = ["--config", "overlays/fsdp.yaml"]
TWO = ["--trainer.devices", "2"]


def free_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        return str(other.getsockname()[1])


def of_torchrun(rank, port, processes=2):
    """What torchrun tells a process, on one node."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes)),
        **{"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"},
    }


def of_srun(rank=0, processes=2, **other):
    """What SLURM tells a task, on one node."""
    return {
        **{"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1", "SLURM_NODEID": "0"},
        **dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"), str(processes)),
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(rank)),
        **other,
    }


@pytest.fixture
def launch(tiny_backbone, tmp_path):
    """``launch((arguments, environment), …, before=[…])``: one process each; their exit statuses and what each wrote.

    Processes that these start write to the same pipe, which ends when all of them have.
    """
    here = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHED) and k not in OF_LAUNCHERS}

    def start(args, environment, before):
        program = [*before, "-m", "gatera_lightning", "fit", "--config", "quickstart.yaml"]
        command = [
            sys.executable,
            *program,
            *tiny_args(tiny_backbone),
            "--trainer.limit_val_batches",
            "0",
            *args,
        ]
        options = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
        }
        return subprocess.Popen(
            command, cwd=tmp_path, env=here | {"OMP_NUM_THREADS": "1"} | environment, **options
        )

    def launch(*processes, before=()):
        started = [start(args, environment, before) for args, environment in processes]
        try:
            return [
                (process.returncode, error)
                for process in started
                for _, error in [process.communicate(timeout=120)]
            ]
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    return launch


def refused(ended, *said, status=2):
    """Every process ended with the status; the first says all this once, and no other anything of it."""
    assert [code for code, _ in ended] == [status] * len(ended), ended
    assert "Traceback" not in "".join(error for _, error in ended)
    first, *others = (error for _, error in ended)
    for text in said:
        assert first.count(text) == 1, first
        assert text not in "".join(others)
    assert first.count("python -m gatera_lightning: ") == 1
    assert "python -m gatera_lightning" not in "".join(others)


# --- how many processes there are ---


@pytest.mark.slow
def test_another_number_than_slurm_started(launch):
    ended = launch(*((["--trainer.devices", "3"], of_srun(rank)) for rank in (0, 1)))
    refused(
        ended, "trainer.devices: 3", "SLURM started 2", "accepted: --trainer.devices 2 --trainer.num_nodes 1"
    )


@pytest.mark.slow
def test_another_number_than_torchrun_started_within_a_task_of_slurm(launch, tmp_path):
    """``devices: 1``, which is quickstart's, would be two runs in one folder."""
    before = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    ((status, _),) = launch(
        ([], of_srun(processes=1)), before=[*before, "--redirects", "3", "--log-dir", str(tmp_path / "logs")]
    )
    assert status != 0
    first, other = (path.read_text() for path in sorted((tmp_path / "logs").rglob("stderr.log")))
    said = (
        "trainer.devices: 1",
        "torchrun started 2 processes",
        "accepted: --trainer.devices 2 --trainer.num_nodes 1",
    )
    refused([(2, first), (2, other)], *said)


@pytest.mark.parametrize(
    ("environment", "nodes", "devices"),
    [
        (of_srun(), 1, 1),
        (of_srun(), 2, 1),
        (of_srun(), 2, 2),
        (of_srun(SLURM_NNODES="2", SLURM_NTASKS="4"), 1, 4),
        (of_torchrun(0, "1"), 1, 1),
        (of_torchrun(0, "1"), 2, 1),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 1, 3),
    ],
)
def test_numbers_that_differ_are_refused_and_the_accepted_ones_are_not(
    monkeypatch, environment, nodes, devices
):
    for name in [name for name in os.environ if name.startswith(LAUNCHED) or name in OF_LAUNCHERS]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="accepted: ") as refusal:
        refuse_other_number(SimpleNamespace(num_nodes=nodes, num_devices=devices))
    assert refusal.value.on_every_process
    *_, devices, _, nodes = str(refusal.value).split()
    refuse_other_number(SimpleNamespace(num_nodes=int(nodes), num_devices=int(devices)))


@pytest.mark.slow
def test_ntasks_without_ntasks_per_node(launch):
    environment = of_srun()
    del environment["SLURM_NTASKS_PER_NODE"]
    refused(launch((TWO, environment)), "--ntasks-per-node=2")


@pytest.mark.slow
def test_a_job_of_slurms_without_srun(launch):
    """It would wait for the other task, which nobody starts."""
    environment = of_srun()
    del environment["SLURM_STEP_ID"]
    refused(launch((TWO, environment)), "SLURM_NTASKS: 2", "without srun; accepted: srun python -m")


def test_an_interactive_shell_of_slurms_needs_no_srun(monkeypatch):
    for name, value in of_srun(SLURM_JOB_NAME="interactive").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID")
    assert not started_by_slurm()
    refuse_without_srun()


# --- how they are laid out ---


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicate_size", "3"], "trainer.strategy.replicate_size: 3 does not divide the 2 processes"),
        (
            ["--replicate_size", "2", "--shard_size", "2"],
            "replicate_size 2 × shard_size 2 is 4, and there are 2 processes",
        ),
        (["--shard_size", "1"], "replicate_size 1 × shard_size 1 is 1, and there are 2 processes"),
        (["--shard_size", "0"], "trainer.strategy.shard_size: 0"),
    ],
)
def test_a_mesh_of_another_number_of_processes_is_refused_before_any_is_started(
    tiny_backbone, capsys, flags, said
):
    flags = [flag.replace("--", "--trainer.strategy.init_args.") for flag in flags]
    args = [
        "fit",
        "--config",
        "quickstart.yaml",
        *SHARDED,
        *tiny_args(tiny_backbone),
        *TWO,
        *flags,
        "--print_config",
    ]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "accepted: " in error


@pytest.mark.slow
def test_a_mesh_of_another_number_of_processes_that_only_the_machine_tells(launch):
    """On a CPU ``auto`` is one."""
    flags = ["--trainer.devices", "auto", "--trainer.strategy.init_args.replicate_size", "2"]
    said = "trainer.strategy.replicate_size: 2 does not divide the 1 processes (nodes × devices); accepted: a divisor"
    refused(launch(([*SHARDED, *flags], {})), said)


@pytest.mark.parametrize(
    ("strategy", "said"),
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
def test_another_way_to_shard_is_refused_before_any_process_is_started(tiny_backbone, capsys, strategy, said):
    args = [
        "fit",
        "--config",
        "quickstart.yaml",
        *tiny_args(tiny_backbone),
        *TWO,
        "--trainer.strategy",
        strategy,
    ]
    assert main([*args, "--print_config"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "accepted: auto, ddp, or --config overlays/fsdp.yaml (FSDP2)" in error


@pytest.mark.slow
def test_a_strategy_that_does_not_exist(launch):
    refused(
        launch(([*TWO, "--trainer.strategy", "nonsense"], {})),
        "trainer: ",
        "`strategy='nonsense'`",
        "Example choices: auto",
    )


# --- where they meet ---


@pytest.mark.slow
def test_a_port_in_use(launch):
    """The second process, which the first has started, would go on asking whoever has the port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = launch((TWO, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}))
    refused(ended, f"cannot meet at 127.0.0.1, port {port}", "set MASTER_PORT to a free one", status=1)


# --- what they were told ---


def launch_two(launch, args, *each):
    """By hand, in torchrun's way: each with arguments of its own."""
    port = free_port()
    return launch(*(([*TWO, *args, *own], of_torchrun(rank, port)) for rank, own in enumerate(each)))


@pytest.mark.slow
def test_processes_with_other_settings_are_told_which(launch):
    settings = {
        "--model.optimizer.lr": ("0.01", "0.003"),
        "--trainer.accumulate_grad_batches": ("1", "2"),
        "--data.init_args.seed": ("0", "5"),
    }
    each = ([part for name, values in settings.items() for part in (name, values[rank])] for rank in (0, 1))
    said = [
        f"{name.removeprefix('--').replace('init_args.', '')}: process 0 has {one}, process 1 has {other}; accepted: the same"
        for name, (one, other) in settings.items()
    ]
    refused(launch_two(launch, [], *each), "3 problems in the configuration", *said)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [[], SHARDED], ids=["ddp", "fsdp"])
def test_processes_with_adapters_of_other_shapes(launch, strategy):
    ended = launch_two(launch, strategy, ["--model.adapter.rank", "4"], ["--model.adapter.rank", "8"])
    refused(ended, "model.adapter.rank: process 0 has 4, process 1 has 8; accepted: the same everywhere")


@pytest.mark.slow
def test_processes_with_other_rows_in_a_file_of_the_same_name(launch, tmp_path):
    """As where each node has a copy of its own; the name is the same setting."""
    port = free_port()
    processes = []
    for rank in (0, 1):
        (tmp_path / f"node-{rank}").mkdir()
        (tmp_path / f"node-{rank}" / "rows.json").write_text(
            json.dumps(sample_rows("train")[rank : rank + 16])
        )
        environment = of_torchrun(rank, port) | {"ROWS": str(tmp_path / f"node-{rank}")}
        processes.append(([*SHARDED, *TWO, "--data.init_args.train", '["$ROWS/rows.json"]'], environment))
    said = "process 1 has other training rows than process 0; accepted: the same everywhere"
    refused(launch(*processes), "1 problem in the configuration", said)


# --- what only the first of them meets ---


@pytest.fixture
def damaged(tiny_backbone, tmp_path):
    return shutil.copytree(tiny_backbone, tmp_path / "damaged")


@pytest.mark.slow
def test_damaged_weights_are_said_once(launch, damaged):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    ended = launch_two(launch, [*SHARDED, "--model.backbone.id", str(damaged)], [], [])
    refused(ended, f"backbone.id: the weights of '{damaged}' are damaged (")


@pytest.mark.slow
def test_weights_that_the_first_process_does_not_find_are_said_once(launch, damaged):
    (damaged / "model.safetensors").unlink()
    ended = launch_two(launch, [*SHARDED, "--model.backbone.id", str(damaged)], [], [])
    refused(ended, f"backbone.id: cannot load the folder '{damaged}'")


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_PROCID", None])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_speaks_before_a_launcher_ends_it(monkeypatch, capsys, launcher, rank):
    """torchrun and srun end all processes once one has ended, which may be another than the first."""

    def refuse(_):
        raise ConfigError("rows: differ", on_every_process=True)

    waited = []
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "1")
    monkeypatch.setattr(gatera_lightning.cli.main, "GateRACLI", refuse)
    monkeypatch.setattr(gatera_lightning.cli.main, "_rank", lambda: rank)
    monkeypatch.setattr(gatera_lightning.cli.main.time, "sleep", waited.append)
    assert gatera_lightning.cli.main.main(["fit"]) == 2
    assert ("rows: differ" in capsys.readouterr().err) == (rank == 0)
    assert bool(waited) == (rank == 1 and launcher is not None)


def test_an_error_that_pickle_cannot_carry_travels_as_its_text(monkeypatch):
    """The others would wait for an answer that the first cannot send."""

    class Held(Exception):
        def __init__(self, *, response):
            self.lock = threading.Lock()
            super().__init__(response)

    def fails(*_):
        raise Held(response="no such weights")

    monkeypatch.setattr(sharded_loading, "load_backbone", fails)
    strategy = SimpleNamespace(
        global_rank=0,
        root_device=torch.device("cpu"),
        broadcast=lambda told: pickle.loads(pickle.dumps(told)),
    )
    with pytest.raises(RuntimeError, match="Held: no such weights"):
        sharded_loading.load_sharded(BackboneConfig(), AdapterConfig(), strategy, seed=0, warm_start=None)
