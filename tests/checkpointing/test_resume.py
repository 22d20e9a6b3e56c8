"""Runs resume from the newest valid checkpoint exactly where they stopped."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from power_cut import ADAPTER, cut_off
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import NO_PICTURES, run_program, tiny_args

from gatera_lightning.cli.main import main

# --- the command line ---


@pytest.fixture(scope="module")
def args(tiny_backbone):
    """Two epochs of three steps, with dropout; a checkpoint every step, a histogram every two steps."""
    return [
        *("fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), "--trainer.max_steps", "-1"),
        *("--model.adapter.dropout", "0.2", "--checkpoint.every_n_steps", "1", "--checkpoint.keep_last", "3"),
        *("--gate_histogram.every_n_steps", "2", "--checkpoint.monitor", "null"),
    ]


@pytest.fixture(scope="module")
def runs(args, tmp_path_factory):
    """The folders of an uninterrupted run, and of one that was killed after four steps."""
    root = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(root):
        assert main(args) == 0
        cut_off(args, 4)
    return [root / "runs" / "quickstart" / f"version_{number}" for number in (0, 1)]


@pytest.fixture
def uninterrupted(runs):
    return runs[0]


@pytest.fixture
def saved(runs, tmp_path, monkeypatch):
    """A copy of the killed run's checkpoints, in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(runs[1] / "checkpoints", "saved"))
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}
    assert steps == {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def adapter_bytes(folder="runs/quickstart/version_0"):
    return Path(folder, ADAPTER).read_bytes()


def test_resume_from_folder_takes_the_newest(args, uninterrupted, saved, caplog):
    assert main([*args, "--ckpt_path", "saved"]) == 0
    assert "skipping" not in caplog.text
    assert adapter_bytes() == adapter_bytes(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "corrupt", [["last.ckpt"], ["last.ckpt", "last-1.ckpt"]], ids=["newest", "newest two"]
)
def test_resume_from_folder_skips_corrupt_checkpoints(args, uninterrupted, saved, caplog, corrupt):
    for name in corrupt:
        flip_a_bit(saved / name)
    with caplog.at_level("INFO", "gatera_lightning"):
        assert main([*args, "--ckpt_path", "saved"]) == 0
    messages = [
        record.getMessage()
        for record in caplog.records
        if record.name == "gatera_lightning.checkpointing.integrity"
    ]
    skipped = sorted(text.partition(": the file is corrupt (record ")[0] for text in messages[:-1])
    assert skipped == sorted(f"skipping the checkpoint saved/{name}" for name in corrupt)
    number = len(corrupt)
    assert (
        messages[-1] == f"newest valid checkpoint: saved/last-{number}.ckpt, at optimizer step {4 - number}"
    )
    assert adapter_bytes() == adapter_bytes(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [2, 5])
@pytest.mark.parametrize("name", ["last.ckpt", "last-1.ckpt"], ids=["mid-epoch", "end of epoch"])
def test_resume_counts_epochs_correctly_under_max_steps(args, uninterrupted, saved, name, epochs):
    """Lightning alone counts an epoch twice and ends one epoch early under max_epochs."""
    ends = ["--trainer.max_steps", "6", "--trainer.max_epochs", str(epochs)]
    assert main([*args, *ends, "--ckpt_path", f"saved/{name}"]) == 0
    last = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert (last["global_step"], last["epoch"]) == (6, 1)
    assert adapter_bytes() == adapter_bytes(uninterrupted)


@pytest.mark.slow
def test_program_prints_which_checkpoints_it_skips(args, uninterrupted, saved):
    flip_a_bit(saved / "last.ckpt")
    output = run_program(*args, "--ckpt_path", "saved", cwd=Path.cwd())
    assert "skipping the checkpoint saved/last.ckpt: the file is corrupt (record " in output
    assert "Restoring states from the checkpoint path at saved/last-1.ckpt" in output
    assert adapter_bytes() == adapter_bytes(uninterrupted)


def test_resume_from_folder_fails_if_all_are_corrupt(args, saved, capsys):
    for path in saved.glob("*.ckpt"):
        flip_a_bit(path)
    assert main([*args, "--ckpt_path", "saved"]) == 1
    message = "saved: every checkpoint is corrupt: last-1.ckpt, last-2.ckpt, last.ckpt"
    assert message in capsys.readouterr().err


def test_resume_from_corrupt_file_fails(args, saved, capsys):
    flip_a_bit(saved / "last.ckpt")
    assert main([*args, "--ckpt_path", "saved/last.ckpt"]) == 1
    message = "python -m gatera_lightning: saved/last.ckpt: the file is corrupt (record "
    assert message in capsys.readouterr().err


def test_resume_from_folder_without_checkpoints_is_a_config_error(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/last.ckpt.tmp").write_text("half a checkpoint")
    assert main([*args, "--ckpt_path", "empty"]) == 2
    assert "ckpt_path: the folder 'empty' holds no checkpoint (*.ckpt); accepted: " in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_ckpt_path_last_starts_and_resumes_in_the_same_folder(
    args, uninterrupted, tmp_path, monkeypatch, caplog
):
    """The same command works for a new job and for a requeued one."""
    monkeypatch.chdir(tmp_path)
    command = [*args, "--ckpt_path", "last", "--trainer.logger.init_args.version", "job"]
    caplog.set_level("INFO", "gatera_lightning")
    cut_off(command, 4)
    assert "no checkpoint in runs/quickstart/job/checkpoints yet: the run starts" in caplog.text
    caplog.clear()
    assert main(command) == 0
    assert (
        "newest valid checkpoint: runs/quickstart/job/checkpoints/last.ckpt, at optimizer step 4"
        in caplog.text
    )
    assert [path.name for path in Path("runs/quickstart").iterdir()] == ["job"]
    assert adapter_bytes("runs/quickstart/job") == adapter_bytes(uninterrupted)
    assert main(command) == 0  # there is nothing left to do
    assert adapter_bytes("runs/quickstart/job") == adapter_bytes(uninterrupted)


def test_finished_run_started_again_changes_nothing(args, tmp_path, monkeypatch):
    """It ends before its first batch, and used to save the random state of its own start."""
    monkeypatch.chdir(tmp_path)
    more = [*NO_PICTURES, "--gate_histogram.every_n_steps", "0", "--model.optimizer.schedule", "constant"]
    more += ["--trainer.val_check_interval", "1"]
    folders = []
    for name, epochs in (("again", [1, 1, 2]), ("straight", [2])):
        for count in epochs:
            ends = ["--trainer.max_epochs", str(count), "--trainer.logger.init_args.version", name]
            assert main([*args, *more, *ends, "--ckpt_path", "last"]) == 0
        folders.append(f"runs/quickstart/{name}")
    assert adapter_bytes(folders[0]) == adapter_bytes(folders[1])


# --- gate histograms ---


def gate_events(folder):
    """Everything that GateHistogram wrote: {step: {tag: histogram, picture or value}}."""
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0, "images": 0})
    events.Reload()
    found = {}
    for name in events.Tags()["histograms"]:
        for event in events.Histograms(name):
            found.setdefault(event.step, {})[name] = event.histogram_value
    for event in events.Images("gate_shares/layers"):
        found.setdefault(event.step, {})["gate_shares/layers"] = event.encoded_image_string
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name) if name.startswith("gate") else ():
            found.setdefault(event.step, {})[name] = event.value
    return found


def test_resumed_run_writes_the_same_gate_histograms(args, uninterrupted, saved):
    """Step 3 lies between two histograms: the counts of the third step come from the checkpoint."""
    state = torch.load(saved / "last-1.ckpt", weights_only=True)["callbacks"]["GateHistogram"]
    assert state["logged_step"] == 2
    assert state["bins"].sum() > 0
    assert main([*args, "--ckpt_path", "saved/last-1.ckpt"]) == 0
    expected, found = gate_events(uninterrupted), gate_events(Path("runs/quickstart/version_0"))
    assert (set(expected), set(found)) == ({2, 4, 6}, {4, 6})
    groups, modules = 1 + 5 + 2, 10  # all modules, projection types, layers; each module
    histograms, scalars, pictures = (groups + modules) * 2, groups * 2 * 4, 1
    assert len(found[4]) == histograms + scalars + pictures
    assert {step: expected[step] for step in found} == found


def test_checkpoint_of_a_step_with_a_histogram_holds_no_counts(saved):
    state = torch.load(saved / "last.ckpt", weights_only=True)["callbacks"]["GateHistogram"]
    assert state.keys() == {"logged_step", "history"}
    assert state["logged_step"] == 4
    assert state["history"]["steps"] == [2, 4]
