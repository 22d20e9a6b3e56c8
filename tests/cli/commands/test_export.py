"""``export``: from any checkpoint, the adapter folder that training would have written."""

import contextlib
import json
import shutil

import pytest
import torch
from sample_checkpoints import write_sharded_checkpoint
from tiny_backbone import tiny_args

from gatera_lightning import BackboneConfig, adapter_parameters, load_adapter
from gatera_lightning.adapters.serialization import trained_template
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.main import main

FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def checkpoints(tiny_backbone, tmp_path_factory):
    """The folder of a run of three steps, saved after each: last is of step 3, last-1 of step 2."""
    root = tmp_path_factory.mktemp("run")
    args = [
        "fit",
        "--config",
        "quickstart.yaml",
        *tiny_args(tiny_backbone),
        "--checkpoint.every_n_steps",
        "1",
    ]
    with contextlib.chdir(root):
        assert main(args) == 0
    return root / "runs" / "quickstart" / "version_0" / "checkpoints"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same(folder, expected):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for name in FILES:
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


def test_a_checkpoint_gives_the_folder_that_lies_beside_it(checkpoints, tiny_backbone, elsewhere, capsys):
    assert main(["export", str(checkpoints / "last.ckpt"), "--out", "mine"]) == 0
    assert (
        capsys.readouterr().out == f"mine: the adapter of {checkpoints / 'last.ckpt'}, at optimizer step 3\n"
    )
    assert_same(elsewhere / "mine", checkpoints / "last")
    assert trained_template("mine") == "plain"  # quickstart.yaml's
    fresh = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32"))
    load_adapter(fresh, "mine")
    saved = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    parameters = adapter_parameters(fresh)
    assert {f"model.{name}" for name in parameters} == set(saved)
    assert all(torch.equal(parameter, saved[f"model.{name}"]) for name, parameter in parameters.items())


def test_a_folder_gives_its_newest(checkpoints, elsewhere):
    assert main(["export", str(checkpoints), "--out", "deep/er/mine"]) == 0
    assert_same(elsewhere / "deep/er/mine", checkpoints / "last")


def test_a_folder_whose_newest_is_damaged(checkpoints, elsewhere, capsys, caplog):
    shutil.copytree(checkpoints, "copy")
    for path in elsewhere.glob("copy/best*.ckpt"):
        path.unlink()
    (elsewhere / "copy/last.ckpt").write_bytes(b"")
    assert main(["export", "copy", "--out", "mine"]) == 0
    assert capsys.readouterr().out == "mine: the adapter of copy/last-1.ckpt, at optimizer step 2\n"
    assert "skipping the checkpoint copy/last.ckpt: the file is empty" in caplog.text
    assert (elsewhere / "mine" / FILES[1]).read_bytes() != (checkpoints / "last" / FILES[1]).read_bytes()


def test_a_sharded_checkpoint_gives_the_same(checkpoints, elsewhere):
    whole = torch.load(checkpoints / "last.ckpt", weights_only=True)
    write_sharded_checkpoint(whole, elsewhere / "sharded.ckpt")
    assert main(["export", "sharded.ckpt", "--out", "mine"]) == 0
    assert_same(elsewhere / "mine", checkpoints / "last")
    (elsewhere / "run").mkdir()
    shutil.move("sharded.ckpt", "run/last.ckpt")
    assert main(["export", "run", "--out", "other"]) == 0
    assert_same(elsewhere / "other", checkpoints / "last")


def test_an_adapter_that_is_there_is_replaced(checkpoints, elsewhere):
    assert main(["export", str(checkpoints / "last-1.ckpt"), "--out", "mine"]) == 0
    assert (elsewhere / "mine" / FILES[1]).read_bytes() != (checkpoints / "last" / FILES[1]).read_bytes()
    assert main(["export", str(checkpoints / "last.ckpt"), "--out", "mine"]) == 0
    assert_same(elsewhere / "mine", checkpoints / "last")


def test_a_file_in_the_place_of_the_folder(checkpoints, elsewhere, capsys):
    (elsewhere / "mine").write_text("a note")
    assert main(["export", str(checkpoints), "--out", "mine"]) == 2
    assert "--out: mine is a file; accepted: a folder, which need not exist" in capsys.readouterr().err
    assert (elsewhere / "mine").read_text() == "a note"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [(flip, "the file is corrupt (record "), (lambda path: path.write_bytes(path.read_bytes()[:999]), "the file is corrupt ("),
     (lambda path: path.write_bytes(b""), "the file is empty")],
    ids=["flipped", "cut", "empty"],
)  # fmt: skip
def test_a_damaged_checkpoint(checkpoints, elsewhere, capsys, harm, said):
    harm(elsewhere / shutil.copy(checkpoints / "last.ckpt", "last.ckpt"))
    assert main(["export", "last.ckpt", "--out", "mine"]) == 1
    assert f"python -m gatera_lightning: last.ckpt: {said}" in capsys.readouterr().err
    assert main(["export", ".", "--out", "mine"]) == 1
    assert ": .: every checkpoint is corrupt: last.ckpt" in capsys.readouterr().err
    assert not (elsewhere / "mine").exists()


class Stranger:
    """What another program pickles."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "it lacks state_dict, adapter, backbone, global_step"),
        ({"state_dict": {}, "global_step": 3}, "it lacks adapter, backbone"),
        ({"state_dict": {}, "backbone": {}, "adapter": {}}, "it lacks global_step"),
    ],
    ids=["a list", "another module's", "no run's"],
)
def test_a_foreign_file(elsewhere, capsys, content, said):
    torch.save(content, "foreign.ckpt")
    assert main(["export", "foreign.ckpt", "--out", "mine"]) == 2
    assert f"CHECKPOINT: foreign.ckpt is no checkpoint of an adapter; {said}\n" in capsys.readouterr().err
    assert not (elsewhere / "mine").exists()


def test_a_file_of_another_program_is_not_unpickled(elsewhere, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": Stranger()}, "foreign.ckpt")
    assert main(["export", "foreign.ckpt", "--out", "mine"]) == 1
    assert "foreign.ckpt: it holds objects of another program" in capsys.readouterr().err
    assert not (elsewhere / "mine").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "nowhere",
            "CHECKPOINT: nowhere does not exist; accepted: a checkpoint (*.ckpt), or a folder of them",
        ),
        ("empty", "CHECKPOINT: empty holds no checkpoint (*.ckpt)"),
        ("note.txt", "CHECKPOINT: note.txt holds no checkpoint (*.ckpt)"),
    ],
)
def test_what_is_no_checkpoint(elsewhere, capsys, name, said):
    (elsewhere / "empty").mkdir()
    (elsewhere / "note.txt").write_text("a note")
    assert main(["export", name, "--out", "mine"]) == 2
    assert said in capsys.readouterr().err


def test_the_folder_says_which_backbone_it_is_of(checkpoints, tiny_backbone, elsewhere):
    assert main(["export", str(checkpoints), "--out", "mine"]) == 0
    origin = json.loads((elsewhere / "mine" / FILES[0]).read_text())["backbone"]
    assert (origin["id"], origin["revision"], len(origin["fingerprint"])) == (str(tiny_backbone), None, 64)
