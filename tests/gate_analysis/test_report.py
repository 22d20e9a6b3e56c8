"""The gate report: its numbers are the model's, its page is whole and harmless, its command refuses what cannot work."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from gate_reports import TEXTS, adapter, asked
from transformers import AutoTokenizer

from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.cli.commands import gates as gates_command
from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.probing import GateProfile, ProbeText
from gatera_lightning.gate_analysis.report import AdapterProfile, build_report


@pytest.fixture
def tuned(tiny_backbone, tmp_path):
    return adapter(tmp_path / "tuned", tiny_backbone)


def gates_by_hand(model, ids):
    """(modules, tokens): σ(w·x + b) of every layer's own input."""
    found = []
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args: found.append(torch.sigmoid(args[0][0] @ layer.gate.weight + layer.gate.bias))
        )
        for layer in adapted_linears(model).values()
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(found).numpy()


def test_every_number_is_the_models(tuned, tiny_backbone, tmp_path):
    assert asked(tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    tokenizer = load_tokenizer(BackboneConfig(id=str(tiny_backbone)))
    (one,) = report["adapters"]
    expected = [gates_by_hand(tuned, tokenizer(text).input_ids) for text in TEXTS]
    for text, gates, found in zip(TEXTS, expected, one["gates"], strict=True):
        assert np.abs(np.array(found) - gates).max() < 1e-6, text
    assert ["".join(text["tokens"]) for text in report["texts"]] == TEXTS
    whole = np.concatenate(expected, 1)
    statistics = one["statistics"]["prompt"]
    assert statistics["tokens"] == whole.shape[1]
    assert statistics["mean"] == pytest.approx(whole.mean(), abs=1e-6)
    assert statistics["share_closed"] == pytest.approx((whole < 0.1).mean(), abs=1e-6)
    assert statistics["share_open"] == pytest.approx((whole >= 0.9).mean(), abs=1e-6)
    assert statistics["bins"] == np.histogram(whole, 50, (0, 1))[0].tolist()
    assert one["statistics"]["response"]["tokens"] == 0
    assert one["phases"] == ["prompt", "response"]
    assert not {"response_read", "response_generated"} & set(one["statistics"])
    rows = [
        k for k, module in enumerate(one["modules"]) if (module["layer"], module["name"]) == (1, "up_proj")
    ]
    assert statistics["mean_by_layer"]["up_proj"][1] == pytest.approx(whole[rows].mean(), abs=1e-6)
    means = [gates.mean(0) for gates in expected]
    assert one["extremes"]["open"][0]["mean"] == pytest.approx(max(map(np.max, means)), abs=1e-6)
    assert one["extremes"]["closed"][0]["mean"] == pytest.approx(min(map(np.min, means)), abs=1e-6)
    assert one["statistics"]["mean_by_position"][0] == pytest.approx(np.mean([m[0] for m in means]), abs=1e-6)


def test_rows_of_a_recipe_are_cut_where_the_response_begins(tuned, tiny_backbone, tmp_path):
    recipe = [
        "--config",
        "quickstart.yaml",
        "--model.backbone.id",
        str(tiny_backbone),
        "--rows",
        "2",
        "--split",
        "validation",
    ]
    assert asked(tmp_path, *recipe, texts=[]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["texts"]) == 2
    for text in report["texts"]:
        assert "".join(text["tokens"][: text["prompt"]]).endswith("Answer:")
        assert text["tokens"][-1] == "<|eos|>"


def test_rows_of_a_recipe_for_other_tokens_are_refused(tuned, tiny_backbone, tmp_path, capsys):
    other = shutil.copytree(tiny_backbone, tmp_path / "other tokens")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(other)
    assert asked(tmp_path, "--config", "quickstart.yaml", "--model.backbone.id", str(other), texts=[]) == 2
    assert (
        f"model.backbone.id: '{other}' has other tokens than the adapter's backbone '{tiny_backbone}'"
        in capsys.readouterr().err
    )


def test_what_is_generated_is_a_decoded_response(tuned, tmp_path):
    assert asked(tmp_path, "--generate", "4") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    for text, given in zip(report["texts"], TEXTS, strict=True):
        assert "".join(text["tokens"][: text["prompt"]]) == given
        assert text["decoded"]
        assert 1 <= len(text["tokens"]) - text["prompt"] <= 4
    (one,) = report["adapters"]
    assert one["phases"] == ["prompt", "response_generated"]
    assert one["statistics"]["response_generated"] == one["statistics"]["response"]
    assert one["statistics"]["response"]["tokens"] == sum(
        len(text["tokens"]) - text["prompt"] for text in report["texts"]
    )


def test_responses_are_apart_by_whether_they_were_read_or_generated(tiny_backbone):
    tokenizer = load_tokenizer(BackboneConfig(id=str(tiny_backbone)))
    texts = [ProbeText("read", [5, 6, 7], 2), ProbeText("generated", [5, 6, 7, 8], 1, generated=True)]
    values = [np.float32([[0.1, 0.2, 0.3]]), np.float32([[0.5, 0.6, 0.7, 0.95]])]
    reading = GateProfile([GatedModule("model.layers.0.q_proj")], texts, values)
    (one,) = build_report([AdapterProfile({}, reading)], tokenizer, {})["adapters"]
    found = one["statistics"]
    assert one["phases"] == ["prompt", "response_read", "response_generated"]
    assert {phase: found[phase]["tokens"] for phase in (*one["phases"], "response")} == {
        "prompt": 3,
        "response_read": 1,
        "response_generated": 3,
        "response": 4,
    }
    assert found["response_read"]["mean"] == pytest.approx(0.3)
    assert found["response_generated"]["mean"] == pytest.approx(0.75)
    assert found["response_generated"]["share_open"] == pytest.approx(1 / 3)
    assert found["response_generated"]["mean_by_layer"] == {"q_proj": [pytest.approx(0.75)]}


def test_two_adapters_on_the_same_texts(tuned, tiny_backbone, tmp_path):
    adapter(tmp_path / "other", tiny_backbone, gate="static", seed=1)
    assert asked(tmp_path, "--adapter", str(tmp_path / "other")) == 0
    one, other = json.loads((tmp_path / "report.json").read_text())["adapters"]
    assert [a["source"]["method"].split(",")[0] for a in (one, other)] == [
        "hira × token gate",
        "hira × static gate",
    ]
    assert np.ptp(np.array(other["gates"][0]), 1).max() == 0  # one value a module
    assert np.array(one["gates"][0]).shape == np.array(other["gates"][0]).shape


def test_the_page_holds_the_report_and_nothing_in_a_text_can_leave_it(tuned, tmp_path):
    assert asked(tmp_path, out="report.html") == 0
    assert asked(tmp_path) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == json.loads((tmp_path / "report.json").read_text())
    assert "<script>document" not in page
    assert not re.search(r"(src|href)\s*=|https?:(?!//www.w3.org/2000/svg)|@import|url\(", page)


def test_a_picture_a_text(tuned, tmp_path):
    assert asked(tmp_path, out="heat.png") == 0
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["heat-1.png", "heat-2.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--text", " "], "--text: '' is empty; accepted: a text"),
        (["--rows", "3"], "--rows: 3, and no rows are read; accepted with a recipe"),
        (["--split", "train"], "--split: train, and no rows are read; accepted with a recipe"),
        (
            ["--split", "dev", "--config", "quickstart.yaml"],
            "--split: 'dev' is unknown; accepted: train, validation, test",
        ),
        (["--rows", "0"], "--rows: 0; accepted: an integer of at least 1"),
        (["--generate", "-1"], "--generate: -1; accepted: tokens to generate, 0 for none"),
        (["--config", "quickstart.yaml"], "--text and --config: texts come from one of them; accepted: "),
        (["--out", "x.pdf"], "--out: x.pdf ends in '.pdf'; accepted: .html, .png, .json, or --format"),
        (
            ["--out", "/nowhere/x.html"],
            "--out: cannot write /nowhere/x.html; accepted: a file in a folder that exists",
        ),
        (["--adapter", "/nowhere"], "--adapter: /nowhere: no adapter here (adapter_config.json is missing)"),
        (["--text", "word " * 300], "tokens; accepted by this model: at most 512"),
        (["--generate", "480"], "tokens; accepted by this model with --generate 480: at most 32"),
        (["--generate", "512"], "--generate: 512; accepted by this model: less than 512"),
    ],
)
def test_what_cannot_work_is_said_before_weights_are_loaded(tuned, tmp_path, capsys, monkeypatch, args, said):
    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(gates_command, "load_backbone", load)
    assert asked(tmp_path, *args) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("report.*"))


def test_a_text_without_tokens_is_refused(tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        gates_command, "tokenize_prompt", lambda tokenizer, text: [5] if text == TEXTS[0] else []
    )
    assert asked(tmp_path) == 2
    assert "--text: 'We ride $5 bikes.' has no tokens; accepted: a text in which" in capsys.readouterr().err


def test_an_adapter_without_gates_is_said_to_have_none(tiny_backbone, tmp_path, capsys):
    adapter(tmp_path / "tuned", tiny_backbone, gate="none")
    assert asked(tmp_path) == 2
    assert (
        f"--adapter: {tmp_path / 'tuned'} has no gates (gate: none, update: hira)" in capsys.readouterr().err
    )
