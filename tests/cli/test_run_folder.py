"""One run in one folder: a second one ends with one sentence, before weights are loaded."""

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tiny_backbone import NO_PICTURES

from gatera_lightning import ConfigError, GateRAModule
from gatera_lightning.checkpointing import output_check, run_lock
from gatera_lightning.checkpointing.run_lock import LOCK_FILE, claim, release
from gatera_lightning.cli import run_folder
from gatera_lightning.cli.main import main

VERSION = ["--trainer.logger.init_args.version", "fixed"]
FOLDER = Path("runs/quickstart/fixed")


@pytest.fixture
def finished(working_folder):
    """The folder of a run that left its config."""
    FOLDER.mkdir(parents=True)
    (FOLDER / "config.yaml").write_text("seed_everything: 0\n")
    return FOLDER


def test_second_run_in_a_folder_is_one_sentence(finished, recipe, problems, no_weights):
    (problem,) = problems("fit", *recipe, *VERSION)
    assert problem == (
        f"the run folder {FOLDER} already has the config.yaml of another run; accepted: another version "
        "(--trainer.logger.init_args.version), or --ckpt_path last to resume that run"
    )
    assert (finished / "config.yaml").read_text() == "seed_everything: 0\n"


def test_second_run_without_logger_is_told_about_another_folder(recipe, problems, no_weights):
    Path("config.yaml").write_text("seed_everything: 0\n")
    (problem,) = problems("fit", *recipe, "--trainer.logger", "false")
    assert "accepted: another folder (--trainer.default_root_dir), or --ckpt_path last" in problem


@pytest.mark.parametrize(
    ("name", "folder", "setting"),
    [
        ("ServerLogger", "", "default_root_dir"),
        ("FolderLogger", "logs", "logger.init_args.save_dir"),
    ],
    ids=["server", "folder"],
)
def test_other_loggers_leave_the_config_and_tell_of_their_own_setting(
    fit, problems, capsys, name, folder, setting
):
    logger = ["--trainer.logger", f"{{class_path: other_loggers.{name}}}"]
    assert main([*fit, *NO_PICTURES, *logger]) == 0
    assert "backbone:" in Path(folder, "config.yaml").read_text()
    assert Path(folder, "checkpoints", "last.ckpt").is_file()
    capsys.readouterr()
    (problem,) = problems(*fit, *NO_PICTURES, *logger)
    assert problem.endswith(
        f"accepted: another folder (--trainer.{setting}), a TensorBoardLogger as the first of several "
        "loggers, or --ckpt_path last to resume that run"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name", "settings", "folder"),
    [
        ("wandb", "WandbLogger", {"save_dir": "logs", "offline": True}, "logs"),
        ("mlflow", "MLFlowLogger", {"tracking_uri": "file:store"}, "store"),
    ],
    ids=["wandb", "mlflow"],
)
def test_last_is_the_checkpoint_of_the_run_before_with_any_first_logger(
    fit, recipe, caplog, monkeypatch, package, name, settings, folder
):
    """Although each start has a name of its own at Weights & Biases and MLflow."""
    library = pytest.importorskip(package, reason=f"needs the extra {package}")
    end_run = getattr(library, "finish", lambda: None)  # else W&B continues the run in this process
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    logger = {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": settings}
    flags = [*NO_PICTURES, "--trainer.logger", json.dumps(logger), "--ckpt_path", "last"]
    assert main([*fit, *flags[:-2]]) == 0
    end_run()
    first = torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)["global_step"]
    assert main(["test", *recipe, *flags]) == 0
    end_run()
    with caplog.at_level("INFO"):
        assert main([*fit, *flags, "--trainer.max_steps", str(first + 1)]) == 0
    end_run()
    assert "the run starts from the beginning" not in caplog.text
    resumed = torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)
    assert resumed["global_step"] == first + 1
    assert [path.name for path in Path().rglob("*.ckpt") if path.parent != Path(folder, "checkpoints")] == []


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_evaluation_in_the_folder_of_a_run_leaves_its_config(fit, recipe, subcommand):
    assert main([*fit, *VERSION]) == 0
    config = (FOLDER / "config.yaml").read_text()
    adapter = ["--model.warm_start", str(FOLDER / "checkpoints" / "last")]
    assert main([subcommand, *recipe, *VERSION, *adapter]) == 0
    assert main([subcommand, *recipe, *VERSION, "--ckpt_path", "last"]) == 0
    assert (FOLDER / "config.yaml").read_text() == config
    assert main(["fit", "--config", str(FOLDER / "config.yaml"), "--ckpt_path", "last"]) == 0


def test_run_after_a_failed_one_is_one_sentence(fit, problems, capsys, monkeypatch):
    def fail(self):
        raise ConfigError("the first run fails")

    with monkeypatch.context() as patch:
        patch.setattr(GateRAModule, "configure_model", fail)
        assert main([*fit, *VERSION]) == 2
    assert (FOLDER / "config.yaml").is_file()
    capsys.readouterr()
    (problem,) = problems(*fit, *VERSION)
    assert "already has the config.yaml" in problem


def test_run_beside_a_running_one_is_one_sentence(fit, problems, monkeypatch, no_weights):
    """Also one that would resume it."""
    monkeypatch.setattr(run_lock.fcntl, "lockf", held)
    FOLDER.mkdir(parents=True)
    (FOLDER / LOCK_FILE).write_text('{"pid": 5, "host": "node3", "job": null, "started": "today"}')
    (problem,) = problems(*fit, *VERSION, "--ckpt_path", "last")
    assert "belongs to a run that is still going: process 5 on node3, started today" in problem


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.logger.init_args.save_dir", "memory://x"],
        ["--trainer.logger", "false", "--trainer.default_root_dir", "memory://x"],
    ],
    ids=["logger", "root"],
)
def test_remote_run_folder_is_one_sentence(recipe, problems, no_weights, flags):
    """Checkpoints would go to a local folder of that name."""
    (problem,) = problems("fit", *recipe, *flags)
    assert problem.startswith("the run folder memory://x")
    assert "is remote, but checkpoints are written atomically" in problem
    assert not Path("memory:").exists()


def loggers(*folders):
    """Flags of one CSVLogger for each folder."""
    return [
        "--trainer.logger",
        json.dumps(
            [
                {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": folder, "name": "", "version": "one"},
                }
                for folder in folders
            ]
        ),
    ]


class Claims:
    """Records the folders that a run claims and releases."""

    def __init__(self, monkeypatch):
        self.claimed, self.released = [], []
        monkeypatch.setattr(run_folder, "claim", lambda folder: self.claimed.append(folder) or claim(folder))
        monkeypatch.setattr(
            run_folder, "release", lambda folder: self.released.append(folder) or release(folder)
        )


@pytest.mark.slow
@pytest.mark.parametrize("folders", [("a", "b"), ("a", "a"), ("a", "b", "./b", "a")], ids="-".join)
def test_folder_of_every_logger_is_claimed_once_and_released(fit, monkeypatch, folders):
    claims = Claims(monkeypatch)
    assert main([*fit, *loggers(*folders)]) == 0
    assert claims.claimed == [
        Path(name, "one").resolve() for name in dict.fromkeys(map(os.path.normpath, folders))
    ]
    assert claims.released == claims.claimed
    assert not run_lock._held
    assert all(Path(name, "one", LOCK_FILE).is_file() for name in folders)


def test_run_whose_second_logger_writes_to_the_folder_of_another_run_is_one_sentence(
    fit, problems, monkeypatch, no_weights
):
    """And it gives up the folder of its first logger."""

    def one_held(file, *args):
        if "/b/" in file.name:
            held()

    monkeypatch.setattr(run_lock.fcntl, "lockf", one_held)
    (problem,) = problems(*fit, *loggers("a", "b"))
    assert problem.startswith("trainer.logger: CSVLogger: the run folder ")
    assert "/b/one belongs to a run that is still going" in problem
    assert not run_lock._held


class SharedFolder(DummyLogger):
    """A logger that makes a folder of its own for each run, in one that runs share, as that of W&B."""

    save_dir = "shared"


@pytest.mark.parametrize(
    "logger", [SharedFolder(), TensorBoardLogger("memory://x")], ids=["shared", "remote"]
)
def test_folder_that_runs_share_or_that_is_remote_is_not_claimed(tmp_path, logger):
    callback = run_folder.RunFolder(None, None)
    callback._claim_of_loggers(Mock(loggers=[CSVLogger(tmp_path, version="one"), logger]))
    assert callback._claimed == ((tmp_path / "lightning_logs" / "one").resolve(),)
    callback._release()
    assert not Path("shared").exists()
    assert not Path("memory:").exists()


@pytest.mark.parametrize("error", [13, 30, 28, 122], ids=["denied", "read-only", "full", "quota"])
@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_folder_that_cannot_be_written_is_one_sentence(
    recipe, capsys, monkeypatch, no_weights, error, subcommand
):
    """A root user may write everywhere, so the refusal of the system is simulated."""

    def refuse(*args, **options):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(output_check.tempfile, "NamedTemporaryFile", refuse)
    assert main([subcommand, *recipe, *VERSION]) == 2
    message = capsys.readouterr().err
    assert "cannot be written (" in message
    assert f": {os.strerror(error)}); accepted: " in message


def make_folder(path):
    path.mkdir(parents=True)


def make_pipe(path):
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


def make_file(path):
    path.parent.mkdir(parents=True)
    path.touch()


OTHER_KINDS = {
    "config.yaml is a folder": ("config.yaml", make_folder, "config.yaml is a folder"),
    "config.yaml is a pipe": ("config.yaml", make_pipe, "config.yaml is a pipe or a device"),
    ".run.lock is a folder": (LOCK_FILE, make_folder, f"{LOCK_FILE} is a folder"),
    ".run.lock is a pipe": (LOCK_FILE, make_pipe, f"{LOCK_FILE} is a pipe or a device"),
    "checkpoints is a file": ("checkpoints", make_file, "checkpoints is not a folder"),
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_entry_of_another_kind_is_one_sentence(recipe, problems, no_weights, case):
    name, make, message = OTHER_KINDS[case]
    make(FOLDER / name)
    (problem,) = problems("fit", *recipe, *VERSION)
    assert message in problem
    assert "accepted: another" in problem


@pytest.mark.parametrize("kind", [make_folder, make_pipe])
def test_evaluation_beside_a_config_of_another_kind_is_one_sentence(recipe, problems, no_weights, kind):
    kind(FOLDER / "config.yaml")
    (problem,) = problems("test", *recipe, *VERSION)
    assert "config.yaml is a " in problem


def held(*args):
    raise BlockingIOError(11, "Resource temporarily unavailable")
