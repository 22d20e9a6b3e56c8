"""``submit``: what it passes to SLURM's commands (stand-ins here), and what it rejects."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from gatera_lightning.cli.main import main

BASH = shutil.which("bash")
SBATCH = """#!/bin/bash
echo "sbatch ${*:1:$#-1}" >> "$FAKE/calls"
if [[ "${!#}" != *.sbatch || "$1" == "$REJECTED" ]]; then
    echo "sbatch: error: invalid partition specified" >&2
    exit 1
fi
if [[ "$1" == --parsable ]]; then echo "$(<"${!#}")" > "$FAKE/submitted"; echo "4711;cluster"; fi
"""
SCONTROL = """#!/bin/bash
cd "$JOBS/job-4711" && echo "scontrol $*: $(echo *)" >> "$FAKE/calls"
if [[ "$1" == "$REJECTED" ]]; then echo "slurm_update error: Invalid job id" >&2; exit 1; fi
"""
SCANCEL = '#!/bin/bash\necho "scancel $*" >> "$FAKE/calls"\n'
SRUN = '#!/bin/bash\nprintf "%s\\0" "$@" > "$FAKE/argv"\n'

PATHS = "accepted: a path without white space, quotes, backslashes, # and %"
WORDS = "accepted: a value without white space, quotes, backslashes and #"
TIMES = "accepted: minutes, hours:minutes:seconds, or days-hours:minutes:seconds"


class OtherLogger(CSVLogger):
    """A logger that ``submit`` does not know, and whose folder may therefore be any."""


class Machine:
    """A PATH that holds bash, and SLURM's commands once they are installed."""

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
        """The calls of SLURM's commands, with their arguments."""
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def srun_arguments(self, script):
        """The arguments of ``srun`` when the script runs as job 4711."""
        environment = os.environ | {"SLURM_JOB_ID": "4711"}
        done = subprocess.run([BASH, str(script)], env=environment, capture_output=True, text=True)
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
    """A machine with SLURM: ``JOBS`` is the folder of its jobs, ``REJECTED`` a command or flag it rejects."""
    machine.install(sbatch=SBATCH, scontrol=SCONTROL, scancel=SCANCEL, srun=SRUN)
    monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("REJECTED", "nothing")
    return machine


@pytest.fixture
def reject(recipe, problems):
    """``reject(*flags)``: the problems that ``submit`` reports."""
    return lambda *flags: problems("submit", *recipe, *flags)


# --- submitting ---


def test_submit_stores_the_job_and_fit_accepts_its_arguments(
    slurm, recipe, capsys, tmp_path, monkeypatch, print_config
):
    root = tmp_path / "a;hurt&$HOME(c)*`d`"
    monkeypatch.setenv("JOBS", str(root))
    name = 'it\'s "a" b;$(touch hurt)\n`touch hurt`'
    python = "/opt/it's my env/$HOME/python"
    setup = (
        "export \\\n  SAID='a  $b; \"c\"'\n"
        'module() { echo "$SAID" "$@" > "$FAKE/module"; }\nmodule load \'x  y\' # why not'
    )
    own = ["--nodes", "2", "--gpus-per-node", "4", "--root", str(root), "--python", python, "--setup", setup]
    assert main(["submit", *own, *recipe, "--trainer.logger.init_args.name", name]) == 0
    folder = root / "job-4711"
    assert capsys.readouterr().out.splitlines() == [
        f"job 4711: {folder}",
        f"  log:     tail -F {folder}/slurm.log",
        "  cancel:  scancel 4711",
    ]
    assert slurm.calls == [
        "sbatch --test-only",
        "sbatch --parsable --hold",
        "scontrol release 4711: job.sbatch submitted.yaml",  # the folder is complete before the job may start
    ]
    script = (folder / "job.sbatch").read_text()
    assert script == (slurm.folder / "submitted").read_text()
    assert "#SBATCH --job-name=it_s__a__b___touch_hurt___touch_hurt_\n" in script

    argv = slurm.srun_arguments(folder / "job.sbatch")
    assert argv == [
        *("--label", "--kill-on-bad-exit=1", python, "-m", "gatera_lightning", "fit"),
        *("--config", f"{folder}/submitted.yaml", "--ckpt_path", "last"),
        *("--trainer.default_root_dir", str(folder)),
        *("--trainer.logger.init_args.save_dir", str(root), "--trainer.logger.init_args.name", ""),
        *("--trainer.logger.init_args.version", "job-4711"),
    ]
    assert (slurm.folder / "module").read_text() == 'a  $b; "c" load x  y\n'
    assert os.listdir() == []
    assert os.listdir(root) == ["job-4711"]

    submitted = yaml.safe_load((folder / "submitted.yaml").read_text())
    assert submitted["trainer"]["logger"]["init_args"]["name"] == name
    trainer = print_config(*argv[argv.index("fit") :])["trainer"]
    sizes = (trainer["num_nodes"], trainer["devices"], trainer["accelerator"])
    assert sizes == (2, 4, "gpu")  # quickstart.yaml has one device
    settings = trainer["logger"]["init_args"]
    assert settings == settings | {"save_dir": str(root), "name": "", "version": "job-4711"}


def test_unknown_logger_writes_to_the_jobs_folder(slurm, recipe, capsys, tmp_path):
    logger = f"{__name__}.OtherLogger"
    assert main(["submit", "--dry-run", *recipe, "--root", "here/jobs", "--trainer.logger", logger]) == 0
    script = tmp_path / "job.sbatch"
    script.write_text(capsys.readouterr().out)
    folder = f"{os.getcwd()}/here/jobs/job-"
    assert f"#SBATCH --output={folder}%j/slurm.log\n" in script.read_text()
    assert slurm.srun_arguments(script)[-4:] == [
        *("--trainer.default_root_dir", f"{folder}4711"),
        *("--trainer.logger.init_args.save_dir", f"{folder}4711"),
    ]


def test_sizes_that_agree_with_the_job_may_be_repeated(recipe, capsys):
    own = ["--gpus-per-node", "4", "--nodes", "2", "--trainer.devices", "4", "--trainer.num_nodes=2"]
    assert main(["submit", "--dry-run", *recipe, *own]) == 0
    assert "#SBATCH --ntasks-per-node=4\n" in capsys.readouterr().out


def test_skip_download_downloads_nothing(slurm, recipe, tmp_path):
    own = ["--root", str(tmp_path / "jobs"), "--skip-download", "--model.backbone.id", "nobody/nothing"]
    assert main(["submit", *recipe, *own]) == 0
    assert slurm.calls[-1].startswith("scontrol release 4711")


@pytest.mark.parametrize("flag", ["--test-only", "--parsable"])
def test_rejection_by_sbatch_is_reported_and_leaves_nothing_behind(
    flag, slurm, reject, tmp_path, monkeypatch
):
    monkeypatch.setenv("REJECTED", flag)
    (problem,) = reject("--root", str(tmp_path / "jobs"))
    assert problem.startswith(f"sbatch {flag}")
    assert problem.endswith(": sbatch: error: invalid partition specified")
    assert not (tmp_path / "jobs").exists()
    assert os.listdir() == []
    assert slurm.calls[-1].startswith(f"sbatch {flag}")


def test_job_that_cannot_be_released_is_cancelled(slurm, reject, tmp_path, monkeypatch):
    monkeypatch.setenv("REJECTED", "release")
    assert reject("--root", str(tmp_path / "jobs")) == [
        "submit: job 4711 is cancelled: scontrol release: slurm_update error: Invalid job id"
    ]
    assert slurm.calls[-1] == "scancel 4711"


def test_job_whose_folder_exists_is_cancelled(slurm, reject, tmp_path):
    (tmp_path / "jobs" / "job-4711").mkdir(parents=True)
    (problem,) = reject("--root", str(tmp_path / "jobs"))
    assert problem.startswith("submit: job 4711 is cancelled: [Errno 17] File exists")
    assert slurm.calls[-1] == "scancel 4711"


def test_failed_download_is_reported_before_submitting(slurm, reject):
    (problem,) = reject("--model.backbone.id", "nobody/nothing")
    assert problem.startswith("model.backbone.id: cannot download 'nobody/nothing' from the hub (")
    assert problem.endswith(
        "); accepted: a model that can be downloaded or is cached, a folder, or --skip-download"
    )
    assert slurm.calls == []


# --- problems ---


def test_machine_without_slurm_is_reported(machine, reject):
    accepted = "accepted: a login node of SLURM, or --dry-run"
    assert reject() == [f"submit: this machine does not have sbatch, srun, scontrol; {accepted}"]
    machine.install(sbatch=SBATCH, scontrol=SCONTROL)
    assert reject() == [f"submit: this machine does not have srun; {accepted}"]
    assert machine.calls == []


@pytest.mark.parametrize(
    ("flags", "problem"),
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
            "--trainer.devices: 2; accepted: 4, which --nodes and --gpus-per-node give",
        ),
        (
            ["--nodes", "2", "--trainer.num_nodes", "3"],
            "--trainer.num_nodes: 3; accepted: 2, which --nodes and --gpus-per-node give",
        ),
        (
            ["--gpus-per-node", "4", "--processes-per-node", "2"],
            "--processes-per-node: 2 for 4 GPUs; accepted: one process per GPU, or --gpus-per-node 0",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_submit_rejects_invalid_flags(flags, problem, slurm, reject):
    assert reject(*flags) == [problem]
    assert slurm.calls == []


def test_submit_rejects_unwritable_log_dir(reject, tmp_path, monkeypatch):
    """SLURM cannot write its log to a path with a space, wherever the path comes from."""
    (tmp_path / "my folder").mkdir()
    monkeypatch.chdir(tmp_path / "my folder")
    assert reject() == [f"--root: '{tmp_path}/my folder/jobs'; {PATHS}"]


def test_submit_reports_all_problems_of_the_job_at_once(reject):
    reported = reject("--nodes", "0", "--time", "soon", "--root", "a b")
    assert [problem.partition(":")[0] for problem in reported] == ["--nodes", "--time", "--root"]


@pytest.mark.parametrize("time", ["5", "5:00", "0:05:00", "0-0:05:00"])
def test_time_limit_has_to_exceed_the_signal(reject, time):
    (problem,) = reject("--time", time)
    assert problem.startswith(f"--signal-seconds: 300, with --time {time}: ")


def test_submit_reports_all_problems_of_fit_at_once(slurm, reject):
    sharded = ["--config", "overlays/fsdp.yaml", "--gpus-per-node", "4"]
    sharded += ["--trainer.strategy.init_args.replicate_size", "3"]
    own = ["--model.adapter.rank", "0", "--data.init_args.batch_size", "0", "--trainer.precision", "16-mixed"]
    assert [problem.partition(": ")[0] for problem in reject(*sharded, *own)] == [
        *("model.adapter.rank", "data.batch_size", "trainer.precision"),
        "trainer.strategy.replicate_size",  # does not divide the job's four ranks
    ]
    assert slurm.calls == []


def test_unknown_config_is_reported(reject):
    (problem,) = reject("--config", "nowhere.yaml")
    assert problem.startswith("--config: 'nowhere.yaml' is neither a file nor a shipped config")


def test_checkpoint_that_the_job_would_not_use_is_rejected(slurm, reject):
    Path("saved").mkdir()
    Path("saved/last.ckpt").touch()
    (problem,) = reject("--ckpt_path", "saved")
    assert problem.startswith(
        "ckpt_path: 'saved'; accepted: null, since a job resumes from its own newest checkpoint;"
    )


def test_several_loggers_are_rejected(reject):
    """A requeued job could not find its folder."""
    Path("loggers.yaml").write_text(
        "trainer: {logger: [{class_path: CSVLogger, init_args: {save_dir: a}}, "
        "{class_path: TensorBoardLogger, init_args: {save_dir: b}}]}\n"
    )
    assert reject("--config", "loggers.yaml") == [
        "trainer.logger: 2 loggers; accepted: one, which writes to the job's folder"
    ]


@pytest.mark.parametrize("setup", ["if true", "echo 'open", "echo $("])
def test_setup_that_is_invalid_bash_is_rejected(setup, slurm, reject):
    (problem,) = reject("--setup", setup)
    assert problem.startswith("--setup: makes the script invalid bash: bash: line ")
    assert slurm.calls == []


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("--node", "--nodes"), ("--gpu-per-node", "--gpus-per-node"), ("--dry-ru", "--dry-run")],
)
def test_unknown_flag_names_near_miss(typo, meant, slurm, recipe, parser_error):
    error = parser_error("submit", *recipe, f"{typo}=2")
    assert error == f"{typo}: there is no such setting; did you mean {meant!r}?"
    assert slurm.calls == []


def test_flag_that_needs_a_number_rejects_text(recipe, parser_error):
    error = parser_error("submit", *recipe, "--nodes", "two")
    assert error == "--nodes: 'two'; accepted: an integer"
