"""``submit``: the script it renders, what it hands to SLURM's commands (stand-ins here), and what it refuses.

``GATERA_RENEW_GOLDEN=1 python -m pytest tests/commands/test_submit.py -k golden`` writes ``golden/submit/*.sbatch`` anew; read
the diff.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from tiny_backbone import tiny_args

from gatera_lightning.cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "submit"
BASH = shutil.which("bash")
ELSEWHERE = ["--root", "/scratch/jobs", "--python", "/opt/env/bin/python"]
JOBS = {
    "one_gpu": [],  # everything by default: the paths of this machine are replaced below
    "two_nodes": [
        *(
            "--nodes",
            "2",
            "--gpus-per-node",
            "4",
            "--partition",
            "long",
            "--account",
            "lab",
            "--time",
            "1-12:00:00",
        ),
        *("--mem", "200G", "--cpus-per-task", "8", "--signal-seconds", "600", *ELSEWHERE),
        *("--setup", 'module load cuda\nexport NCCL_DEBUG="WARN"', "--config", "overlays/fsdp.yaml"),
    ],
    "cpu": ["--gpus-per-node", "0", "--processes-per-node", "2", "--trainer.logger", "null", *ELSEWHERE],
}
SBATCH = """#!/bin/bash
echo "sbatch ${*:1:$#-1}" >> "$FAKE/calls"
if [[ "${!#}" != *.sbatch || "$1" == "$REFUSED" ]]; then echo "sbatch: error: invalid partition specified" >&2; exit 1; fi
if [[ "$1" == --parsable ]]; then echo "$(<"${!#}")" > "$FAKE/handed_in"; echo "4711;cluster"; fi
"""
SCONTROL = """#!/bin/bash
cd "$JOBS/job-4711" && echo "scontrol $*: $(echo *)" >> "$FAKE/calls"
if [[ "$1" == "$REFUSED" ]]; then echo "slurm_update error: Invalid job id" >&2; exit 1; fi
"""
SCANCEL = '#!/bin/bash\necho "scancel $*" >> "$FAKE/calls"\n'
SRUN = '#!/bin/bash\nprintf "%s\\0" "$@" > "$FAKE/argv"\n'


class Notes(CSVLogger):
    """A logger whose folder is not save_dir/name/version, as far as ``submit`` knows."""


class Machine:
    """A PATH with bash and nothing else on it, until SLURM's commands are put there."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "bash").symlink_to(BASH)

    def install(self, **commands):
        for name, text in commands.items():
            (self.folder / "bin" / name).write_text(text)
            (self.folder / "bin" / name).chmod(0o755)

    @property
    def calls(self):
        """What SLURM's commands were called with, one a line."""
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def started(self, script):
        """What ``srun`` gets when the script runs as job 4711."""
        done = subprocess.run(
            [BASH, str(script)], env=os.environ | {"SLURM_JOB_ID": "4711"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return (self.folder / "argv").read_text().split("\0")[:-1]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    machine = Machine(tmp_path / "machine")
    monkeypatch.setenv("PATH", str(machine.folder / "bin"))
    monkeypatch.setenv("FAKE", str(machine.folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return machine


@pytest.fixture
def slurm(machine, tmp_path, monkeypatch):
    """A machine with SLURM, whose jobs lie in ``JOBS``; ``REFUSED`` is the flag or command that it refuses."""
    machine.install(sbatch=SBATCH, scontrol=SCONTROL, scancel=SCANCEL, srun=SRUN)
    monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("REFUSED", "nothing")
    return machine


@pytest.fixture
def flags(tiny_backbone):
    return ["--config", "quickstart.yaml", *tiny_args(tiny_backbone)]


@pytest.fixture
def refused(flags, capsys):
    """``refused(*flags)``: the problems that ``submit`` reports, one a line."""

    def problems(*own):
        assert main(["submit", *flags, *own]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        return [line.removeprefix("  - ") for line in error.splitlines() if line.startswith("  - ")]

    return problems


# --- the script ---


@pytest.mark.parametrize("name", JOBS)
def test_a_dry_run_prints_the_golden_script_without_slurm_and_writes_nothing(name, flags, capsys):
    assert main(["submit", "--dry-run", *flags, *JOBS[name]]) == 0
    printed = capsys.readouterr().out.replace(sys.executable, "PYTHON").replace(os.getcwd(), "FOLDER")
    if os.environ.get("GATERA_RENEW_GOLDEN") == "1":
        (GOLDEN / f"{name}.sbatch").write_text(printed)
    assert printed == (GOLDEN / f"{name}.sbatch").read_text()
    assert os.listdir() == []


@pytest.mark.parametrize("name", JOBS)
def test_a_golden_script_is_bash(name):
    subprocess.run([BASH, "-n", str(GOLDEN / f"{name}.sbatch")], check=True)


@pytest.mark.parametrize("name", JOBS)
def test_shellcheck_has_nothing_to_say_about_a_golden_script(name, monkeypatch):
    monkeypatch.undo()  # the real PATH
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-S", "warning", str(GOLDEN / f"{name}.sbatch")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_log_lies_in_the_folder_that_the_run_writes_to(slurm, flags, capsys, tmp_path):
    assert (
        main(["submit", "--dry-run", *flags, "--root", "here/jobs", "--trainer.logger", "test_submit.Notes"])
        == 0
    )
    script = tmp_path / "job.sbatch"
    script.write_text(capsys.readouterr().out)
    folder = f"{os.getcwd()}/here/jobs/job-"
    assert f"#SBATCH --output={folder}%j/slurm.log\n" in script.read_text()
    assert slurm.started(script)[-4:] == [
        *(
            "--trainer.default_root_dir",
            f"{folder}4711",
            "--trainer.logger.init_args.save_dir",
            f"{folder}4711",
        )
    ]


# --- handing in ---


def test_a_job_is_handed_in_with_its_folder_and_fit_accepts_what_it_starts(
    slurm, flags, capsys, tmp_path, monkeypatch
):
    root = tmp_path / "a;hurt&$HOME(c)*`d`"
    monkeypatch.setenv("JOBS", str(root))
    name = 'it\'s "a" b;$(touch hurt)\n`touch hurt`'
    python = "/opt/it's my env/$HOME/python"
    setup = 'export \\\n  SAID=\'a  $b; "c"\'\nmodule() { echo "$SAID" "$@" > "$FAKE/module"; }\nmodule load \'x  y\' # why not'
    own = ["--nodes", "2", "--gpus-per-node", "4", "--root", str(root), "--python", python, "--setup", setup]
    assert main(["submit", *own, *flags, "--trainer.logger.init_args.name", name]) == 0
    folder = root / "job-4711"
    assert capsys.readouterr().out.splitlines() == [
        f"job 4711: {folder}",
        f"  watch it:  tail -F {folder}/slurm.log",
        "  end it:    scancel 4711",
    ]
    assert slurm.calls == [
        "sbatch --test-only",
        "sbatch --parsable --hold",
        "scontrol release 4711: job.sbatch submitted.yaml",  # the folder is whole before the job may start
    ]
    script = (folder / "job.sbatch").read_text()
    assert script == (slurm.folder / "handed_in").read_text()
    assert "#SBATCH --job-name=it_s__a__b___touch_hurt___touch_hurt_\n" in script

    argv = slurm.started(folder / "job.sbatch")
    assert argv == [
        *("--label", "--kill-on-bad-exit=1", python, "-m", "gatera_lightning", "fit"),
        *(
            "--config",
            f"{folder}/submitted.yaml",
            "--ckpt_path",
            "last",
            "--trainer.default_root_dir",
            str(folder),
        ),
        *("--trainer.logger.init_args.save_dir", str(root), "--trainer.logger.init_args.name", ""),
        *("--trainer.logger.init_args.version", "job-4711"),
    ]
    assert (slurm.folder / "module").read_text() == 'a  $b; "c" load x  y\n'
    assert os.listdir() == []
    assert os.listdir(root) == ["job-4711"]

    assert (
        yaml.safe_load((folder / "submitted.yaml").read_text())["trainer"]["logger"]["init_args"]["name"]
        == name
    )
    with pytest.raises(SystemExit) as caught:
        main([*argv[argv.index("fit") :], "--print_config"])
    assert caught.value.code == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["num_nodes"], trainer["devices"], trainer["accelerator"]) == (
        2,
        4,
        "gpu",
    )  # quickstart.yaml has one device
    assert (
        trainer["logger"]["init_args"] | {"save_dir": str(root), "name": "", "version": "job-4711"}
        == (trainer["logger"]["init_args"])
    )


@pytest.mark.parametrize("flag", ["--test-only", "--parsable"])
def test_what_sbatch_refuses_is_said_and_leaves_nothing_behind(flag, slurm, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSED", flag)
    (said,) = refused("--root", str(tmp_path / "jobs"))
    assert said.startswith(f"sbatch {flag}")
    assert said.endswith(": sbatch: error: invalid partition specified")
    assert not (tmp_path / "jobs").exists()
    assert os.listdir() == []
    assert slurm.calls[-1].startswith(f"sbatch {flag}")


def test_a_job_that_cannot_be_released_is_cancelled(slurm, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSED", "release")
    (said,) = refused("--root", str(tmp_path / "jobs"))
    assert said == "submit: job 4711 is cancelled: scontrol release: slurm_update error: Invalid job id"
    assert slurm.calls[-1] == "scancel 4711"


def test_a_job_whose_folder_is_there_already_is_cancelled(slurm, refused, tmp_path):
    (tmp_path / "jobs" / "job-4711").mkdir(parents=True)
    (said,) = refused("--root", str(tmp_path / "jobs"))
    assert said.startswith("submit: job 4711 is cancelled: [Errno 17] File exists")
    assert slurm.calls[-1] == "scancel 4711"


def test_a_model_that_cannot_be_fetched_is_said_before_anything_is_handed_in(slurm, refused):
    (said,) = refused("--model.backbone.id", "nobody/nothing")
    assert said.startswith("model.backbone.id: cannot fetch 'nobody/nothing' from the hub (")
    assert said.endswith(
        "); accepted: what can be fetched here or is in the cache, a folder, or --skip-download"
    )
    assert slurm.calls == []


def test_nothing_is_fetched_where_that_is_asked_for(slurm, flags, tmp_path):
    own = ["--root", str(tmp_path / "jobs"), "--skip-download", "--model.backbone.id", "nobody/nothing"]
    assert main(["submit", *flags, *own]) == 0
    assert slurm.calls[-1].startswith("scontrol release 4711")


# --- problems ---


def test_a_machine_without_slurm_is_said(machine, refused):
    accepted = "accepted: a login node of SLURM, or --dry-run"
    assert refused() == [f"submit: sbatch, srun, scontrol is not on this machine; {accepted}"]
    machine.install(sbatch=SBATCH, scontrol=SCONTROL)
    assert refused() == [f"submit: srun is not on this machine; {accepted}"]
    assert machine.calls == []


PATHS = "accepted: a path without white space, quotes, backslashes, # and %"
WORDS = "accepted: what has no white space, quotes, backslashes or #"
TIMES = "accepted: minutes, hours:minutes:seconds, or days-hours:minutes:seconds"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--nodes", "0"], "--nodes: 0; accepted: an integer of at least 1"),
        (["--gpus-per-node", "-1"], "--gpus-per-node: -1; accepted: an integer of at least 0"),
        (["--cpus-per-task", "0"], "--cpus-per-task: 0; accepted: an integer of at least 1"),
        (["--signal-seconds", "-5"], "--signal-seconds: -5; accepted: an integer of at least 1"),
        (["--time", "12h"], f"--time: '12h'; {TIMES}"),
        (["--time", "1:2:3"], f"--time: '1:2:3'; {TIMES}"),
        (["--time", "12:00:00\n"], f"--time: '12:00:00\\n'; {TIMES}"),
        (["--root", "/a b"], f"--root: '/a b'; {PATHS}"),
        (["--root", "/it's"], f'--root: "/it\'s"; {PATHS}'),
        (["--root", "/100%"], f"--root: '/100%'; {PATHS}"),
        (["--partition", "a\nrm -r /"], f"--partition: 'a\\nrm -r /'; {WORDS}"),
        (["--account", "a#b"], f"--account: 'a#b'; {WORDS}"),
        (["--mem", "2 G"], f"--mem: '2 G'; {WORDS}"),
        (
            ["--gpus-per-node", "4", "--trainer.devices=2"],
            "--trainer.devices: 2; accepted: 4, as the job has it, by --nodes and --gpus-per-node",
        ),
        (
            ["--nodes", "2", "--trainer.num_nodes", "3"],
            "--trainer.num_nodes: 3; accepted: 2, as the job has it, by --nodes and --gpus-per-node",
        ),
        (
            ["--gpus-per-node", "4", "--processes-per-node", "2"],
            "--processes-per-node: 2 for 4 GPUs; accepted: one a GPU, or --gpus-per-node 0",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_said_with_what_is_accepted(own, said, slurm, refused):
    assert refused(*own) == [said]
    assert slurm.calls == []


def test_a_folder_that_slurm_could_not_write_its_log_to_is_refused_wherever_it_comes_from(
    refused, tmp_path, monkeypatch
):
    (tmp_path / "my folder").mkdir()
    monkeypatch.chdir(tmp_path / "my folder")
    assert refused() == [f"--root: '{tmp_path}/my folder/jobs'; {PATHS}"]


def test_sizes_that_agree_with_the_job_may_be_said_twice(flags, capsys):
    own = ["--gpus-per-node", "4", "--nodes", "2", "--trainer.devices", "4", "--trainer.num_nodes=2"]
    assert main(["submit", "--dry-run", *flags, *own]) == 0
    assert "#SBATCH --ntasks-per-node=4\n" in capsys.readouterr().out


def test_problems_of_the_job_are_reported_together(refused):
    assert [
        said.partition(":")[0] for said in refused("--nodes", "0", "--time", "soon", "--root", "a b")
    ] == [*("--nodes", "--time", "--root")]


@pytest.mark.parametrize("time", ["5", "5:00", "0:05:00", "0-0:05:00"])
def test_a_job_that_would_be_told_to_end_when_it_begins_is_refused(refused, time):
    (said,) = refused("--time", time)
    assert said.startswith(f"--signal-seconds: 300 of --time {time}: ")


def test_what_fit_would_refuse_with_the_jobs_processes_is_refused_all_at_once(slurm, refused):
    sharded = [
        "--config",
        "overlays/fsdp.yaml",
        "--gpus-per-node",
        "4",
        "--trainer.strategy.init_args.replicate_size",
        "3",
    ]
    own = ["--model.adapter.rank", "0", "--data.init_args.batch_size", "0", "--trainer.precision", "16-mixed"]
    assert [said.partition(";")[0] for said in refused(*sharded, *own)] == [
        "model.adapter.rank: 0 is not a rank",
        "data.batch_size: 0",
        "trainer.precision: '16-mixed' would cast the adapter's masters",
        "trainer.strategy.replicate_size: 3 does not divide the 4 processes (nodes × devices)",
    ]
    assert slurm.calls == []


def test_an_unknown_config_is_said_with_the_shipped_ones(refused):
    (said,) = refused("--config", "nowhere.yaml")
    assert said.startswith(
        "--config: 'nowhere.yaml' is neither a file nor a shipped config; shipped: llama2_commonsense.yaml, "
    )


def test_a_checkpoint_that_the_job_would_pass_over_is_refused(slurm, refused):
    Path("saved").mkdir()
    Path("saved/last.ckpt").touch()
    (said,) = refused("--ckpt_path", "saved")
    assert said.startswith(
        "ckpt_path: 'saved'; accepted: null, since a job goes on from its own newest checkpoint;"
    )


def test_several_loggers_are_refused_since_a_requeued_job_would_not_find_its_folder(refused):
    Path("loggers.yaml").write_text(
        "trainer: {logger: [{class_path: CSVLogger, init_args: {save_dir: a}}, "
        "{class_path: TensorBoardLogger, init_args: {save_dir: b}}]}\n"
    )
    assert refused("--config", "loggers.yaml") == [
        "trainer.logger: 2 of them; accepted: one, whose folder is the job's"
    ]


@pytest.mark.parametrize("setup", ["if true", "echo 'open", "echo $("])
def test_a_setup_that_is_no_bash_is_refused(setup, slurm, refused):
    (said,) = refused("--setup", setup)
    assert said.startswith("--setup: the script is not valid bash with it: bash: line ")
    assert slurm.calls == []


@pytest.mark.parametrize("typo", ["--node", "--gpu-per-node", "--dry-ru"])
def test_a_flag_that_neither_submit_nor_fit_knows_is_refused(typo, slurm, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["submit", *flags, f"{typo}=2"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {typo}=2\n")
    assert slurm.calls == []


def test_a_number_that_is_none_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["submit", *flags, "--nodes", "two"])
    assert caught.value.code == 2
    assert "argument --nodes: invalid int value: 'two'" in capsys.readouterr().err
