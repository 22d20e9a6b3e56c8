"""Jobs on a real SLURM cluster of two nodes, requeued on USR1 and preempted by an urgent job.

``GATERA_PREEMPTIONS`` is how often a job is preempted: twice by default, ten times under ``make stress``.
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from slurm_command import slurm
from tiny_backbone import run_program, tiny_args

from gatera_lightning.cli.main import main

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).parents[2] / "helpers"
TIMES = int(os.environ.get("GATERA_PREEMPTIONS", "2"))
STEPS = 8 + 4 * TIMES
FLAGS = {"ddp": [], "fsdp": ["--config", "overlays/fsdp.yaml"]}


def recipe(backbone, strategy):
    """A run of ``STEPS`` steps with dropout and a validation every five steps."""
    args = ["--config", "quickstart.yaml", *FLAGS[strategy], *tiny_args(backbone)]
    args += ["--trainer.max_steps", str(STEPS), "--trainer.max_epochs", "-1"]
    args += ["--trainer.val_check_interval", "5", "--model.adapter.dropout", "0.1"]
    args += ["--data.init_args.train", '["everyday[:160]"]', "--data.init_args.batch_size", "4"]
    return [*args, "--trainer.callbacks+=pace.Pace"]


def steps(folder, rank):
    file = Path(folder) / f"steps_{rank}.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("]")]
        if file.exists()
        else []
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny_backbone, tmp_path_factory):
    """The folders of uninterrupted runs on two processes, without SLURM."""
    root = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HELPERS))
        for strategy in FLAGS:
            args = [*recipe(tiny_backbone, strategy), "--trainer.devices", "2"]
            run_program(
                "fit",
                *args,
                "--trainer.logger.init_args.save_dir",
                str(root / strategy),
                cwd=root,
                timeout=240,
            )
    return {strategy: root / strategy / "quickstart" / "version_0" for strategy in FLAGS}


def state(job):
    """JobState and the number of restarts."""
    found = slurm("scontrol", "show", "job", job, "-o")
    return re.search(r"JobState=(\S+)", found)[1], int(re.search(r"Restarts=(\d+)", found)[1])


@pytest.mark.timeout(300 + 90 * TIMES)
@pytest.mark.parametrize("strategy", FLAGS)
def test_requeued_and_preempted_job_trains_bit_equal(
    strategy, cluster, uninterrupted, tiny_backbone, tmp_path, monkeypatch, capsys, wait_for
):
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    setup = f"export GLOO_SOCKET_IFNAME=lo PYTHONPATH={shlex.quote(str(HELPERS))}"
    job = ["--nodes", "2", "--gpus-per-node", "0", "--partition", "main"]
    job += ["--root", str(tmp_path), "--setup", setup]
    pace = ["--trainer.callbacks.seconds", "0.4"]
    assert main(["submit", *job, "--time", "30", *recipe(tiny_backbone, strategy), *pace]) == 0
    printed = capsys.readouterr().out
    number, folder = re.search(r"^job (\d+): (\S+)$", printed, re.MULTILINE).groups()
    log = Path(folder) / "slurm.log"

    for turn in range(TIMES):
        wanted = len(steps(folder, 0)) + 2

        def has_progressed(wanted=wanted):
            return len(steps(folder, 0)) >= wanted or state(number)[0] in ("COMPLETED", "FAILED")

        wait_for(has_progressed, 120)
        assert state(number)[0] == "RUNNING", log.read_text()[-3000:]
        if turn % 2:  # the urgent job takes both nodes and releases them
            command = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null"]
            urgent = slurm(*command, "--wrap", "sleep 1")
            wait_for(lambda: state(urgent)[0] == "COMPLETED", 90)  # noqa: B023
        else:
            slurm("scancel", "--signal=USR1", number)
        wait_for(lambda: state(number)[1] > turn, 60)  # noqa: B023
        wait_for(lambda: state(number)[0] in ("PENDING", "RUNNING"), 60)
        slurm(
            "scontrol", "update", f"jobid={number}", "StartTime=now"
        )  # a requeued job would wait two minutes
    wait_for(lambda: state(number)[0] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 240)
    assert state(number) == ("COMPLETED", TIMES), log.read_text()[-3000:]

    for rank in (0, 1):
        expected = {step: rest for step, *rest in steps(uninterrupted[strategy], rank)}
        found = steps(folder, rank)
        assert {step for step, *_ in found} == set(expected) == set(range(1, STEPS + 1))
        assert all(rest == expected[step] for step, *rest in found)
    name = Path("checkpoints") / "last" / "adapter_model.safetensors"
    assert (Path(folder) / name).read_bytes() == (uninterrupted[strategy] / name).read_bytes()
    # On a busy machine the nodes may be taken before the step ends; the run then resumes from an earlier
    # checkpoint.
    assert (TIMES + 1) // 2 <= log.read_text().count("preempted at optimizer step") <= TIMES
    assert {"job.sbatch", "submitted.yaml", "slurm.log", "config.yaml", "checkpoints"} <= {
        p.name for p in Path(folder).iterdir()
    }


def test_rendered_script_passes_sbatch_test(cluster, tmp_path, capsys):
    assert (
        main(["submit", "--dry-run", "--nodes", "2", "--gpus-per-node", "0", "--config", "quickstart.yaml"])
        == 0
    )
    script = tmp_path / "job.sbatch"
    script.write_text(capsys.readouterr().out)
    slurm("sbatch", "--test-only", str(script))


def test_batch_script_without_srun_is_refused(cluster, tiny_backbone, tmp_path, wait_for, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    script = tmp_path / "job.sbatch"
    command = shlex.join([sys.executable, "-m", "gatera_lightning", "fit", *recipe(tiny_backbone, "ddp")])
    script.write_text(f"#!/bin/bash\n{command}\necho status $?\n")
    log = tmp_path / "log"
    slurm("sbatch", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", f"--chdir={tmp_path}", str(script))
    wait_for(lambda: log.exists() and "status" in log.read_text(), 90)
    assert "SLURM_NTASKS: 2, but this process was started without srun" in log.read_text()
    assert "status 2" in log.read_text()


@pytest.mark.timeout(240)
def test_cancelled_job_saves_and_is_not_requeued(
    cluster, tiny_backbone, tmp_path, monkeypatch, capsys, wait_for
):
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    setup = f"export GLOO_SOCKET_IFNAME=lo PYTHONPATH={shlex.quote(str(HELPERS))}"
    job = ["--nodes", "1", "--gpus-per-node", "0", "--time", "30"]
    job += ["--root", str(tmp_path), "--setup", setup]
    workers = ["--trainer.callbacks.seconds", "0.4", "--data.init_args.num_workers", "1"]
    assert main(["submit", *job, *recipe(tiny_backbone, "ddp"), *workers]) == 0
    number, folder = re.search(r"^job (\d+): (\S+)$", capsys.readouterr().out, re.MULTILINE).groups()
    wait_for(lambda: len(steps(folder, 0)) >= 2, 120)
    slurm("scancel", number)
    wait_for(lambda: state(number)[0] not in ("RUNNING", "COMPLETING"), 60)
    assert state(number) == ("CANCELLED", 0), (Path(folder) / "slurm.log").read_text()[-3000:]
    assert "preempted at optimizer step" in (Path(folder) / "slurm.log").read_text()
    assert (Path(folder) / "checkpoints" / "last.ckpt").is_file()


def test_submit_reports_what_slurm_refuses(cluster, tmp_path, capsys):
    args = [
        "submit",
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--partition",
        "nowhere",
        "--root",
        str(tmp_path),
    ]
    assert main([*args, "--config", "quickstart.yaml", "--skip-download"]) == 2
    assert "invalid partition" in capsys.readouterr().err
    assert not any(tmp_path.glob("job-*"))
