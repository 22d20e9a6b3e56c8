"""``test`` with a draft adapter: the same predictions, and what the drafts saved in the report."""

import json
import re

import pytest
from draft_folders import draft_folder
from evaluations import BOTH, merged_bytes, perturbed_module
from tiny_backbone import tiny_args, tiny_data, tiny_trainer

from gatera_lightning import BackboneConfig, ConfigError
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.callbacks.drafted_answers import DraftedAnswers
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.cli.main import main
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.generation.drafting import DraftCounts


@pytest.fixture(scope="module")
def module(tiny_backbone):
    module = perturbed_module(tiny_backbone)
    module.decoding.max_new_tokens = 12
    return module


@pytest.fixture(scope="module")
def draft(tiny_backbone, tmp_path_factory):
    model = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32"), "cpu")
    return str(draft_folder(model, tmp_path_factory.mktemp("drafted") / "draft", size=1e-3))


@pytest.fixture(autouse=True)
def early_drafts(monkeypatch):
    """Measured times never decide, and few passes come before the first drafts."""
    monkeypatch.setattr("gatera_lightning.generation.drafting.payoff._SAMPLES", 10**9)
    monkeypatch.setattr("gatera_lightning.generation.drafting.payoff._PLAIN", 1)


def evaluate(module, folder, *callbacks, stage="test", evaluate_by=BOTH, **settings):
    trainer = tiny_trainer(folder, EvaluationReport(str(folder)), *callbacks)
    data = tiny_data(
        module.backbone.id, test=["everyday[:7]"], evaluate_by=evaluate_by, eval_batch_size=3, **settings
    )
    getattr(trainer, stage)(module, datamodule=data, **({"verbose": False} if stage == "test" else {}))


def test_predictions_are_those_without_drafts(module, draft, tmp_path, capsys):
    evaluate(module, tmp_path / "plain")
    assert "drafts" not in capsys.readouterr().out
    evaluate(module, tmp_path / "drafted", DraftedAnswers(draft, 3))
    assert module.drafter is None
    assert merged_bytes(tmp_path / "drafted") == merged_bytes(tmp_path / "plain")
    results = [
        json.loads((tmp_path / name / "test_results.json").read_text()) for name in ("plain", "drafted")
    ]
    assert "drafts" not in results[0]
    figures = results[1]["drafts"]
    assert (figures["block"], figures["acceptance"].keys()) == (3, {"1", "2"})
    assert figures["tokens_per_forward"] == figures["tokens"] / figures["forwards"]
    line = f"drafts: {figures['tokens']} tokens in {figures['forwards']} forward passes"
    out = capsys.readouterr().out
    assert line in out
    assert re.search(r"accepted drafts by depth: \d+%, \d+%\n", out)
    assert results[0]["identity"] == results[1]["identity"]  # either evaluation may resume the other


def test_predict_drafts_too(module, draft, tmp_path, capsys):
    evaluate(module, tmp_path / "plain", stage="predict", evaluate_by=["generation"])
    evaluate(module, tmp_path / "drafted", DraftedAnswers(draft), stage="predict", evaluate_by=["generation"])
    assert merged_bytes(tmp_path / "drafted") == merged_bytes(tmp_path / "plain")
    assert "accepted drafts by depth" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "settings", "block", "message"),
    [
        ("test", {"evaluate_by": ["likelihood"]}, 4, r"evaluate_by \['likelihood'\] generates no answers"),
        ("validate", {}, 4, "draft: .*, but validate generates no answers; accepted: null, or test"),
        ("test", {}, 1, "draft_block: 1; accepted: an integer of at least 2"),
    ],
)
def test_run_without_drafts_is_refused(module, draft, tmp_path, stage, settings, block, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(module, tmp_path, DraftedAnswers(draft, block), stage=stage, **settings)


def test_every_problem_is_named(module, draft, tmp_path, monkeypatch):
    monkeypatch.setattr(module.decoding, "beams", 4)
    data = tiny_data(module.backbone.id, evaluate_by=BOTH)
    strategy = AdapterShardingStrategy()
    found = DraftedAnswers(str(tmp_path)).problems("test", module, data, strategy)
    assert [problem.partition(":")[0] for problem in found] == ["draft", "model.decoding.beams", "draft"]
    assert "with sharded weights" in found[0]
    assert "adapter_config.json" in found[2]


def test_block_longer_than_the_mask_embeddings_is_refused(module, tiny_backbone, tmp_path):
    model = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32"), "cpu")
    folder = draft_folder(model, tmp_path / "masks", gate=PositionGateConfig(mask_embeddings=2))
    data = tiny_data(module.backbone.id, evaluate_by=BOTH)
    (problem,) = DraftedAnswers(str(folder)).problems("test", module, data, "auto")
    assert problem.startswith("draft_block: 4, but the draft adapter has 2 mask embeddings")


def test_counts_of_two_ranks_are_added():
    first, second = DraftCounts(), DraftCounts()
    first.add(1, drafts=2, accepted=0)
    second.add(3, drafts=3, accepted=2)
    both = first + second
    assert (both.forwards, both.tokens) == (2, 4)
    assert both.acceptance() == {1: 0.5, 2: 0.5, 3: 0.0}


def test_failed_test_leaves_no_drafter(tiny_backbone, draft, tmp_path, monkeypatch):
    """Lightning does not tear down a stage that has raised."""

    def fail(*args, **settings):
        raise RuntimeError("no memory")

    module, data = perturbed_module(tiny_backbone), tiny_data(tiny_backbone, evaluate_by=["generation"])
    monkeypatch.setattr("gatera_lightning.generation.drafting.Drafter.generate", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        tiny_trainer(tmp_path, DraftedAnswers(draft)).test(module, datamodule=data, verbose=False)
    assert module.drafter is None


def test_flag_of_the_command_line(tiny_backbone, draft, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ["--config", "quickstart.yaml", *tiny_args(tiny_backbone)]
    own += ["--data.init_args.evaluate_by", '["generation"]', "--evaluation.folder", "results"]
    assert main(["test", *own, "--draft", draft, "--draft_block", "3"]) == 0
    assert "accepted drafts by depth: " in capsys.readouterr().out
    figures = json.loads((tmp_path / "results" / "test_results.json").read_text())["drafts"]
    assert figures["acceptance"].keys() == {"1", "2"}


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("fit", ["--draft", "DRAFT"], "but fit generates no answers"),
        ("test", ["--draft", "DRAFT"], "but data.evaluate_by ['likelihood'] generates no answers"),
        ("test", ["--draft_block", "3"], "draft_block: 3, without drafts; accepted: null, or with draft"),
        ("test", ["--draft", "nowhere"], "draft: "),
    ],
)
def test_flags_are_refused_before_weights_load(
    tiny_backbone, draft, tmp_path, monkeypatch, capsys, command, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gatera_lightning.training.module.load_adapted_model", None)
    given = [draft if flag == "DRAFT" else flag for flag in flags]
    assert main([command, "--config", "quickstart.yaml", *tiny_args(tiny_backbone), *given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
