"""``export``: the adapter folder that training would have written, from any checkpoint."""

import contextlib
import shutil

import pytest
import torch
from sample_checkpoints import write_sharded_checkpoint
from tiny_backbone import tiny_args

from gatera_lightning import BackboneConfig, adapter_parameters, load_adapter
from gatera_lightning.adapters.serialization import read_adapter_config, trained_template
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.adapter_argument import ACCEPTED
from gatera_lightning.cli.main import main

FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def checkpoints(tiny_backbone, tmp_path_factory):
    """The folder of a run of three steps, saved after each: last is of step 3, last-1 of step 2."""
    root = tmp_path_factory.mktemp("run")
    flags = [*tiny_args(tiny_backbone), "--checkpoint.every_n_steps", "1"]
    with contextlib.chdir(root):
        assert main(["fit", "--config", "quickstart.yaml", *flags]) == 0
    return root / "runs" / "quickstart" / "version_0" / "checkpoints"


def assert_same_files(folder, expected):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", *FILES]
    for name in FILES:
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


# --- checkpoints ---


def test_checkpoint_gives_the_folder_beside_it(checkpoints, tiny_backbone, working_folder, capsys):
    last = checkpoints / "last.ckpt"
    assert main(["export", str(last), "--out", "mine"]) == 0
    assert capsys.readouterr().out == f"mine: the adapter of {last}, at optimizer step 3\n"
    assert_same_files(working_folder / "mine", checkpoints / "last")
    assert trained_template("mine") == "plain"  # that of quickstart.yaml
    _, origin = read_adapter_config("mine")
    assert (origin["id"], origin["revision"], len(origin["fingerprint"])) == (str(tiny_backbone), None, 66)
    model = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32"))
    load_adapter(model, "mine")
    saved = torch.load(last, weights_only=True)["state_dict"]
    parameters = adapter_parameters(model)
    assert {f"model.{name}" for name in parameters} == set(saved)
    assert all(torch.equal(parameter, saved[f"model.{name}"]) for name, parameter in parameters.items())


def test_folder_gives_its_newest_checkpoint(checkpoints, working_folder):
    assert main(["export", str(checkpoints), "--out", "deep/er/mine"]) == 0
    assert_same_files(working_folder / "deep/er/mine", checkpoints / "last")


def test_folder_of_a_run_gives_the_newest_checkpoint_inside(checkpoints, working_folder, capsys):
    assert main(["export", str(checkpoints.parent), "--out", "mine"]) == 0
    assert str(checkpoints / "last.ckpt") in capsys.readouterr().out
    assert_same_files(working_folder / "mine", checkpoints / "last")


def test_corrupt_newest_checkpoint_is_skipped(checkpoints, working_folder, capsys, caplog):
    shutil.copytree(checkpoints, "copy")
    for path in working_folder.glob("copy/best*.ckpt"):
        path.unlink()
    (working_folder / "copy/last.ckpt").write_bytes(b"")
    assert main(["export", "copy", "--out", "mine"]) == 0
    assert capsys.readouterr().out == "mine: the adapter of copy/last-1.ckpt, at optimizer step 2\n"
    assert "skipping the checkpoint copy/last.ckpt" in caplog.text
    newest = (checkpoints / "last" / FILES[1]).read_bytes()
    assert (working_folder / "mine" / FILES[1]).read_bytes() != newest


def test_sharded_checkpoint_gives_the_same_folder(checkpoints, working_folder):
    unsharded = torch.load(checkpoints / "last.ckpt", weights_only=True)
    write_sharded_checkpoint(unsharded, working_folder / "sharded.ckpt")
    assert main(["export", "sharded.ckpt", "--out", "mine"]) == 0
    assert_same_files(working_folder / "mine", checkpoints / "last")
    (working_folder / "run").mkdir()
    shutil.move("sharded.ckpt", "run/last.ckpt")
    assert main(["export", "run", "--out", "other"]) == 0
    assert_same_files(working_folder / "other", checkpoints / "last")


def test_existing_adapter_folder_is_replaced(checkpoints, working_folder):
    assert main(["export", str(checkpoints / "last-1.ckpt"), "--out", "mine"]) == 0
    newest = (checkpoints / "last" / FILES[1]).read_bytes()
    assert (working_folder / "mine" / FILES[1]).read_bytes() != newest
    assert main(["export", str(checkpoints / "last.ckpt"), "--out", "mine"]) == 0
    assert_same_files(working_folder / "mine", checkpoints / "last")


# --- problems ---


def test_existing_file_is_not_replaced(checkpoints, working_folder, problems):
    (working_folder / "mine").write_text("a note")
    assert problems("export", str(checkpoints), "--out", "mine") == [
        "--out: mine is a file; accepted: a folder, which does not have to exist"
    ]
    assert (working_folder / "mine").read_text() == "a note"


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (flip_bit, "corrupt (record "),
        (lambda path: path.write_bytes(path.read_bytes()[:999]), "corrupt ("),
        (lambda path: path.write_bytes(b""), "empty"),
    ],
    ids=["flipped", "truncated", "empty"],
)
def test_corrupt_checkpoint_is_reported(checkpoints, working_folder, capsys, corrupt, message):
    corrupt(working_folder / shutil.copy(checkpoints / "last.ckpt", "last.ckpt"))
    assert main(["export", "last.ckpt", "--out", "mine"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m gatera_lightning: last.ckpt: ")
    assert message in error
    assert main(["export", ".", "--out", "mine"]) == 1
    assert ": .: every checkpoint is corrupt: last.ckpt" in capsys.readouterr().err
    assert not (working_folder / "mine").exists()


class UnknownObject:
    """An object that another program pickles."""


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ([1, 2], "state_dict, adapter, backbone, global_step"),
        ({"state_dict": {}, "global_step": 3}, "adapter, backbone"),
        ({"state_dict": {}, "backbone": {}, "adapter": {}}, "global_step"),
    ],
    ids=["a list", "another module's checkpoint", "no step"],
)
def test_file_of_another_program_is_reported(working_folder, problems, content, missing):
    torch.save(content, "foreign.ckpt")
    assert problems("export", "foreign.ckpt", "--out", "mine") == [
        f"CHECKPOINT: foreign.ckpt is not a checkpoint of an adapter; missing entries: {missing}"
    ]
    assert not (working_folder / "mine").exists()


def test_file_of_another_program_is_not_unpickled(working_folder, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": UnknownObject()}, "foreign.ckpt")
    assert main(["export", "foreign.ckpt", "--out", "mine"]) == 1
    error = capsys.readouterr().err
    assert "foreign.ckpt: " in error
    assert "contains pickled classes that are not allowed" in error
    assert not (working_folder / "mine").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("empty", "holds neither a checkpoint (*.ckpt) nor an adapter"),
        ("note.txt", "holds neither a checkpoint (*.ckpt) nor an adapter"),
    ],
)
def test_path_without_checkpoint_is_reported(working_folder, problems, name, message):
    (working_folder / "empty").mkdir()
    (working_folder / "note.txt").write_text("a note")
    (problem,) = problems("export", name, "--out", "mine")
    assert problem == f"CHECKPOINT: {name} {message}; accepted: a checkpoint (*.ckpt), {ACCEPTED}"
