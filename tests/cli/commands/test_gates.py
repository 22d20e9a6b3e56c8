"""Tests of the ``gates`` subcommand: where its texts come from, what it writes, and what it rejects."""

import json
import shutil

import numpy as np
import pytest
import torch
from gate_reports import TEXTS, run_gates, save_random_adapter
from transformers import AutoTokenizer

from gatera_lightning import record_gates
from gatera_lightning.cli import probe_texts
from gatera_lightning.cli.commands import gates as gates_command
from gatera_lightning.cli.main import main


@pytest.fixture
def tuned(tiny_backbone, tmp_path):
    save_random_adapter(tmp_path / "tuned", tiny_backbone)


def test_gates_splits_examples_of_recipe_into_prompt_and_response(tuned, tiny_backbone, tmp_path):
    recipe = ["--config", "quickstart.yaml", "--model.backbone.id", str(tiny_backbone)]
    assert run_gates(tmp_path, *recipe, "--rows", "2", "--split", "validation", texts=[]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["texts"]) == 2
    for text in report["texts"]:
        assert "".join(text["tokens"][: text["prompt"]]).endswith("Answer:")
        assert text["tokens"][-1] == "<|eos|>"


def test_gates_rejects_recipe_with_other_tokenizer(tuned, tiny_backbone, tmp_path, capsys):
    other = shutil.copytree(tiny_backbone, tmp_path / "other tokens")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": len(tokenizer)}))
    recipe = ["--config", "quickstart.yaml", "--model.backbone.id", str(other)]
    assert run_gates(tmp_path, *recipe, texts=[]) == 2
    message = (
        f"the vocabulary of '{other}' is not that of the adapter's backbone '{tiny_backbone}'; accepted: "
    )
    assert f"model.backbone.id: {message}" in capsys.readouterr().err


def test_gates_generates_responses(tuned, tmp_path):
    assert run_gates(tmp_path, "--generate", "4") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    for text, prompt in zip(report["texts"], TEXTS, strict=True):
        assert "".join(text["tokens"][: text["prompt"]]) == prompt
        assert text["decoded"]
        assert 1 <= len(text["tokens"]) - text["prompt"] <= 4
    (adapter,) = report["adapters"]
    assert adapter["phases"] == ["prompt", "response_generated"]
    assert adapter["statistics"]["response_generated"] == adapter["statistics"]["response"]
    generated = sum(len(text["tokens"]) - text["prompt"] for text in report["texts"])
    assert adapter["statistics"]["response"]["tokens"] == generated


def test_gates_compares_two_adapters_on_same_texts(tuned, tiny_backbone, tmp_path):
    save_random_adapter(tmp_path / "other", tiny_backbone, gate="static", seed=1)
    assert run_gates(tmp_path, "--adapter", str(tmp_path / "other")) == 0
    token, static = json.loads((tmp_path / "report.json").read_text())["adapters"]
    methods = [adapter["source"]["method"].split(",")[0] for adapter in (token, static)]
    assert methods == ["hira × token gate", "hira × static gate"]
    assert np.ptp(np.array(static["gates"][0]), 1).max() == 0  # one value for each module
    assert np.array(token["gates"][0]).shape == np.array(static["gates"][0]).shape


def test_gates_draws_one_picture_per_text(tuned, tmp_path):
    assert run_gates(tmp_path, out="heat.png") == 0
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["heat-1.png", "heat-2.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", " "], "--text: '' is empty; accepted: a text"),
        (["--rows", "3"], "--rows: 3, without a recipe; accepted with a recipe"),
        (["--split", "train"], "--split: train, without a recipe; accepted with a recipe"),
        (
            ["--split", "dev", "--config", "quickstart.yaml"],
            "--split: 'dev' is unknown; accepted: train, validation, test",
        ),
        (["--rows", "0"], "--rows: 0; accepted: an integer of at least 1"),
        (["--generate", "-1"], "--generate: -1; accepted: a number of tokens, or 0"),
        (["--config", "quickstart.yaml"], "--text and --config: give one of them; accepted: "),
        (["--out", "x.pdf"], "--out: x.pdf ends in '.pdf'; accepted: .html, .png, .json, or --format"),
        (
            ["--out", "/nowhere/x.html"],
            "--out: cannot write /nowhere/x.html; accepted: a file in an existing, writable folder",
        ),
        (
            ["--adapter", "/nowhere"],
            "--adapter: /nowhere: not an adapter folder (adapter_config.json is missing)",
        ),
        (["--text", "word " * 300], "tokens; accepted by this model: at most 512"),
        (["--generate", "480"], "tokens; accepted by this model with --generate 480: at most 32"),
        (["--generate", "512"], "--generate: 512; accepted by this model: less than 512"),
    ],
)
def test_gates_rejects_invalid_arguments_before_loading_weights(
    tuned, tmp_path, capsys, monkeypatch, args, message
):
    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(gates_command, "load_backbone", load)
    assert run_gates(tmp_path, *args) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("report.*"))


def test_gates_rejects_text_without_tokens(tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        probe_texts, "tokenize_prompt", lambda tokenizer, text: [5] if text == TEXTS[0] else []
    )
    assert run_gates(tmp_path) == 2
    assert "--text: 'We ride $5 bikes.' has no tokens; accepted: a text with" in capsys.readouterr().err


def test_gates_rejects_adapter_without_gates(tiny_backbone, tmp_path, capsys):
    save_random_adapter(tmp_path / "tuned", tiny_backbone, gate="none")
    assert run_gates(tmp_path) == 2
    assert (
        f"--adapter: {tmp_path / 'tuned'} has no gates (gate: none, update: hira)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("gate", ["hard", "token"])
def test_rank_modules_prints_and_writes_shares_of_skipped_tokens(tiny_backbone, tmp_path, capsys, gate):
    model = save_random_adapter(tmp_path / "tuned", tiny_backbone, gate=gate)
    assert run_gates(tmp_path, "--rank_modules") == 0
    (adapter,) = json.loads((tmp_path / "report.json").read_text())["adapters"]
    ids = [
        AutoTokenizer.from_pretrained(tiny_backbone)(text, return_tensors="pt").input_ids for text in TEXTS
    ]
    with torch.no_grad(), record_gates(model) as gates:
        for row in ids:
            model(input_ids=row)
    expected = {name: [] for name in gates.names}
    for name, logit in zip(gates.names, gates.logits, strict=True):
        closed = logit <= 0 if gate == "hard" else logit.sigmoid() < 0.1
        expected[name] += closed.flatten().tolist()
    assert {m["name"]: m["skipped"] for m in adapter["modules"]} == pytest.approx(
        {name: np.mean(closed) for name, closed in expected.items()}
    )
    shares = [module["skipped"] for module in adapter["modules"]]
    assert shares == sorted(shares)
    assert 0 < len(set(shares)) > 1
    out = capsys.readouterr().out
    assert all(module["name"] in out for module in adapter["modules"])
    assert f"--model.adapter.target_modules '[{', '.join(adapter['suggested_targets'])}]'" in out


def test_rank_modules_needs_no_file_and_writes_no_page(tuned, tmp_path, capsys):
    adapter = ["gates", "--adapter", str(tmp_path / "tuned"), "--text", "Some words.", "--dtype", "float32"]
    assert main([*adapter, "--rank-modules"]) == 0
    assert "mean gate" in capsys.readouterr().out
    assert main([*adapter, "--rank_modules", "--out", str(tmp_path / "x.html")]) == 2
    assert "x.html; accepted with --rank_modules: .json" in capsys.readouterr().err
    assert main(adapter) == 2
    assert "--out: missing; accepted: a file, or --rank_modules" in capsys.readouterr().err
