"""Tests of the gate report: its numbers match the model, and its page contains the data safely."""

import json
import re

import numpy as np
import pytest
import torch
from gate_reports import TEXTS, run_gates, save_random_adapter

from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.backbone.loading import BackboneConfig, load_tokenizer
from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.probing import GateProfile, ProbeText
from gatera_lightning.gate_analysis.report import AdapterProfile, build_report


@pytest.fixture
def tuned(tiny_backbone, tmp_path):
    return save_random_adapter(tmp_path / "tuned", tiny_backbone)


def expected_gates(model, ids):
    """Compute σ(w·x + b) from the input of every layer, (modules, tokens)."""
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


def test_report_numbers_match_model(tuned, tiny_backbone, tmp_path):
    assert run_gates(tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    tokenizer = load_tokenizer(BackboneConfig(id=str(tiny_backbone)))
    (adapter,) = report["adapters"]
    expected = [expected_gates(tuned, tokenizer(text).input_ids) for text in TEXTS]
    for text, gates, found in zip(TEXTS, expected, adapter["gates"], strict=True):
        assert np.abs(np.array(found) - gates).max() < 1e-6, text
    assert ["".join(text["tokens"]) for text in report["texts"]] == TEXTS
    joined = np.concatenate(expected, 1)
    statistics = adapter["statistics"]["prompt"]
    assert statistics["tokens"] == joined.shape[1]
    assert statistics["mean"] == pytest.approx(joined.mean(), abs=1e-6)
    assert statistics["share_closed"] == pytest.approx((joined < 0.1).mean(), abs=1e-6)
    assert statistics["share_open"] == pytest.approx((joined >= 0.9).mean(), abs=1e-6)
    assert statistics["bins"] == np.histogram(joined, 50, (0, 1))[0].tolist()
    assert adapter["statistics"]["response"]["tokens"] == 0
    assert adapter["phases"] == ["prompt", "response"]
    assert not {"response_read", "response_generated"} & set(adapter["statistics"])
    rows = [
        k
        for k, module in enumerate(adapter["modules"])
        if (module["layer"], module["name"]) == (1, "up_proj")
    ]
    assert statistics["mean_by_layer"]["up_proj"][1] == pytest.approx(joined[rows].mean(), abs=1e-6)
    means = [gates.mean(0) for gates in expected]
    extremes = adapter["extremes"]
    assert extremes["open"][0]["mean"] == pytest.approx(max(map(np.max, means)), abs=1e-6)
    assert extremes["closed"][0]["mean"] == pytest.approx(min(map(np.min, means)), abs=1e-6)
    by_position = adapter["statistics"]["mean_by_position"]
    assert by_position[0] == pytest.approx(np.mean([m[0] for m in means]), abs=1e-6)


def test_report_separates_given_and_generated_responses(tiny_backbone):
    tokenizer = load_tokenizer(BackboneConfig(id=str(tiny_backbone)))
    texts = [ProbeText("given", [5, 6, 7], 2), ProbeText("generated", [5, 6, 7, 8], 1, generated=True)]
    gates = [np.float32([[0.1, 0.2, 0.3]]), np.float32([[0.5, 0.6, 0.7, 0.95]])]
    profile = GateProfile([GatedModule("model.layers.0.q_proj")], texts, gates)
    (adapter,) = build_report([AdapterProfile({}, profile)], tokenizer, {})["adapters"]
    statistics = adapter["statistics"]
    assert adapter["phases"] == ["prompt", "response_read", "response_generated"]
    assert {phase: statistics[phase]["tokens"] for phase in (*adapter["phases"], "response")} == {
        "prompt": 3,
        "response_read": 1,
        "response_generated": 3,
        "response": 4,
    }
    assert statistics["response_read"]["mean"] == pytest.approx(0.3)
    assert statistics["response_generated"]["mean"] == pytest.approx(0.75)
    assert statistics["response_generated"]["share_open"] == pytest.approx(1 / 3)
    assert statistics["response_generated"]["mean_by_layer"] == {"q_proj": [pytest.approx(0.75)]}


def test_page_contains_report_and_escapes_texts(tuned, tmp_path):
    assert run_gates(tmp_path, out="report.html") == 0
    assert run_gates(tmp_path) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == json.loads((tmp_path / "report.json").read_text())
    assert "<script>document" not in page


def test_page_is_self_contained(tuned, tmp_path):
    assert run_gates(tmp_path, out="report.html") == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|https?:(?!//www.w3.org/2000/svg)|@import|url\(", page)
    assert "{{" not in page  # all placeholders are replaced
