"""``chat`` and ``generate`` with ``--draft``: the same answers, and figures on standard error."""

import json
import shutil

import pytest
from draft_folders import draft_folder
from gate_reports import save_random_adapter
from terminal_models import GreedyReference, escape, talkative_backbone

from gatera_lightning import BackboneConfig
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.main import main

PROMPTS = ["What do bees make?", "Tom has 3 boxes.\nHow many"]


@pytest.fixture(scope="module")
def folders(tiny_backbone, tmp_path_factory):
    """A backbone, an adapter with token gates, and a draft adapter."""
    root = tmp_path_factory.mktemp("drafts")
    backbone = talkative_backbone(tiny_backbone, root / "backbone")
    save_random_adapter(root / "adapter", backbone)
    model = load_backbone(BackboneConfig(id=str(backbone), dtype="float32"), "cpu")
    draft_folder(model, root / "draft", size=1e-3)
    draft_folder(load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32"), "cpu"), root / "other")
    model = load_backbone(BackboneConfig(id=str(backbone), dtype="float32"), "cpu")
    draft_folder(model, root / "masks", size=1e-3, gate=PositionGateConfig(mask_embeddings=3))
    return root


def run(folders, *flags, prompts=PROMPTS, adapter="adapter"):
    given = [arg for prompt in prompts for arg in ("--prompt", prompt)]
    own = ["--template", "none", "--max_new_tokens", "30", "--dtype", "float32"]
    return main(["generate", "--adapter", str(folders / adapter), *given, *own, *flags])


@pytest.mark.parametrize(("draft", "block"), [("draft", None), ("draft", 2), ("masks", None), ("masks", 2)])
def test_answers_are_those_of_greedy_decoding(folders, capsys, draft, block):
    flags = [] if block is None else ["--draft_block", str(block)]
    assert run(folders, "--draft", str(folders / draft), *flags) == 0
    out, err = capsys.readouterr()
    reference = GreedyReference(folders / "backbone", str(folders / "adapter"))
    assert out == "".join(escape(reference.text(prompt, 30)) + "\n" for prompt in PROMPTS)
    assert f"{draft}, in blocks of {block or 4} tokens" in err
    assert "so far 30 tokens in " in err
    assert "accepted drafts by depth: " in err


def test_sampling_takes_drafts(folders, capsys):
    flags = ["--draft", str(folders / "draft"), "--temperature", "0.8", "--top_p", "0.9", "--seed", "3"]
    flags += ["--max_new_tokens", "8"]  # too few for measured times to decide about drafts
    texts = []
    for more in ([], ["--draft_block", "4"]):
        assert run(folders, *flags, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n\n"  # the seed decides


@pytest.mark.parametrize(("template", "is_noted"), [("none", True), ("plain", False)])
def test_other_template_than_in_training_is_noted(folders, tmp_path, capsys, template, is_noted):
    shutil.copytree(folders / "draft", tmp_path / "draft")
    path = tmp_path / "draft" / "adapter_config.json"
    description = json.loads(path.read_text())
    description["gatera"]["template"] = "plain"
    path.write_text(json.dumps(description))
    flags = ["--draft", str(tmp_path / "draft"), "--max_new_tokens", "2", "--template", template]
    assert run(folders, *flags) == 0
    note = "(trained with template plain, so fewer drafts may be accepted)"
    assert (note in capsys.readouterr().err) == is_noted


def test_draft_adapter_of_another_model_is_refused(folders, capsys):
    assert run(folders, "--draft", str(folders / "other")) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "other: was trained on another backbone" in " ".join(err.split())
    assert "or decoding without drafts" in " ".join(err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft_block", "3"], "--draft_block: 3, without drafts; accepted with --draft"),
        (["--draft", "draft", "--draft_block", "1"], "--draft_block: 1; accepted: an integer of at least 2"),
        (["--draft", "draft", "--gates"], "--gates: gates of drafted tokens are not shown"),
        (["--draft", "adapter"], "update 'hira' with gate 'token' cannot draft; accepted: update 'lora'"),
        (["--draft", "masks", "--draft_block", "5"], "--draft_block: 5, but the draft adapter has 3 mask"),
        (["--draft", "backbone"], "--draft: "),
    ],
)
def test_flags_are_refused_before_weights_load(folders, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("gatera_lightning.cli.terminal_model.load_backbone", None)
    monkeypatch.chdir(folders)
    assert run(folders, *flags, prompts=PROMPTS[:1]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
