"""Candidate ranking: batched, padded and shuffled, it must say what one plain forward a row says."""

import json

import pytest
import torch
from tiny_backbone import PlainQuestion, sample_rows, tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import adapter_parameters, load_adapter, save_adapter
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.evaluation.ranking import OptionRanking, RankedQuestion, RankingResult, answer_log_likelihoods, ranked

ROWS = 6


def row_by_row(folder, adapter):
    """``[(log-likelihoods, tokens, gold)]`` of the first test questions, one unpadded forward per candidate."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    load_adapter(model, adapter)
    questions = []
    for question in map(PlainQuestion.of, sample_rows("test")[:ROWS]):
        scores, tokens = [], []
        for answer in question.answers:
            start = len(tokenizer(question.prompt).input_ids)
            ids = [*tokenizer(question.prompt + answer).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
            tokens.append(len(ids) - start)
        questions.append((scores, tokens, question.gold))
    return questions


@pytest.fixture(scope="module")
def evaluated(tiny_backbone, tmp_path_factory):
    """A moved adapter, its ranking by ``Trainer.test``, the logged metrics, and the plain computation."""
    root = tmp_path_factory.mktemp("ranking")
    module = tiny_module(tiny_backbone, gate_bias=1.0)
    module.configure_model()
    with torch.no_grad():
        for parameter in adapter_parameters(module.model).values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    report = EvaluationReport()
    trainer = tiny_trainer(root, report)
    (metrics,) = trainer.test(module, datamodule=tiny_data(tiny_backbone), verbose=False)
    return report.result, metrics, row_by_row(tiny_backbone, save_adapter(module.model, root / "adapter"))


def test_every_score_equals_the_plain_one(evaluated):
    result, _, plain = evaluated
    assert [q.example for q in result.questions] == list(range(ROWS))
    for question, (scores, tokens, gold) in zip(result.questions, plain, strict=True):
        assert question.log_likelihoods == pytest.approx(scores, rel=1e-5)
        assert (list(question.tokens), question.gold) == (tokens, gold)


def test_logged_accuracy_and_loss_equal_the_plain_ones(evaluated):
    _, metrics, plain = evaluated
    by_sum = sum(max(range(len(s)), key=s.__getitem__) == gold for s, _, gold in plain) / ROWS
    means = [([a / b for a, b in zip(s, t, strict=True)], gold) for s, t, gold in plain]
    by_token = sum(max(range(len(m)), key=m.__getitem__) == gold for m, gold in means) / ROWS
    loss = -sum(s[gold] for s, _, gold in plain) / sum(t[gold] for _, t, gold in plain)
    assert metrics["test/accuracy_sum"] == pytest.approx(by_sum)
    assert metrics["test/accuracy_per_token"] == pytest.approx(by_token)
    assert metrics["test/loss"] == pytest.approx(loss, rel=1e-5)


def test_the_scores_differ_enough_to_mean_something(evaluated):
    result, *_ = evaluated
    assert all(max(q.log_likelihoods) - min(q.log_likelihoods) > 0.1 for q in result.questions)
    assert len({tokens for q in result.questions for tokens in q.tokens}) > 2


def test_log_likelihoods_go_to_their_rows():
    kept = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    logits = torch.randn(1, 5, 11, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 1, 4, 1, 5])
    total, tokens = answer_log_likelihoods(logits, targets, kept)
    log_p = logits[0].float().log_softmax(-1)
    expected = [float(log_p[0, 3] + log_p[1, 1]), 0.0, float(log_p[2, 4] + log_p[3, 1] + log_p[4, 5])]
    assert total.tolist() == pytest.approx(expected, rel=1e-6)
    assert tokens.tolist() == [2, 0, 3]
    assert total.dtype == torch.float32


def test_choice_by_sum_and_per_token():
    question = RankedQuestion(example=0, task=0, gold=1, log_likelihoods=(-3.0, -4.0, -9.0), tokens=(1, 2, 4))
    assert (question.choice("sum"), question.choice("per_token")) == (0, 1)
    result = RankingResult((question,), incomplete=0)
    assert (result.accuracy("sum").value, result.accuracy("per_token").value) == (0.0, 1.0)


def test_the_first_of_equals_is_chosen():
    question = RankedQuestion(0, 0, 0, (-2.0, -1.0, -1.0), (2, 1, 1))
    assert (question.choice("sum"), question.choice("per_token")) == (1, 0)


def test_accuracy_by_task_and_gold_loss():
    result = RankingResult(
        (
            RankedQuestion(0, 0, 0, (-1.0, -2.0), (1, 1)),
            RankedQuestion(1, 1, 0, (-6.0, -2.0), (3, 1)),
            RankedQuestion(2, 1, 1, (-6.0, -2.0), (3, 4)),
        ),
        incomplete=0,
    )
    assert [(a.hits, a.n) for a in (result.accuracy("sum", task) for task in (0, 1, None, 9))] == [
        (1, 1),
        (1, 2),
        (2, 3),
        (0, 0),
    ]
    assert result.gold_loss == pytest.approx((1.0 + 6.0 + 2.0) / (1 + 3 + 4))


def keys(*rows, candidates=2):
    """Rows of (example, candidate), all gold 0, task 0, one token."""
    table = torch.tensor([[example, candidate, 0, candidates, 0, 1] for example, candidate in rows])
    return table, -torch.arange(float(len(rows)))


def test_any_order_gives_the_same_questions():
    result = ranked(*keys((7, 1), (2, 0), (7, 0), (2, 1)))
    assert [q.example for q in result.questions] == [2, 7]
    assert [q.log_likelihoods for q in result.questions] == [(-1.0, -3.0), (-2.0, -0.0)]
    assert result.incomplete == 0


def test_rows_that_stand_for_no_example_are_left_out():
    assert [q.example for q in ranked(*keys((-1, 0), (3, 0), (-1, 0), (3, 1))).questions] == [3]


def test_a_candidate_scored_twice_is_an_error():
    with pytest.raises(ValueError, match="candidate 1 of example 4 was scored twice"):
        ranked(*keys((4, 0), (4, 1), (4, 1)))


@pytest.mark.parametrize("scored", [[(4, 0), (4, 2)], [(4, 0), (4, 1)], [(4, 2)]], ids=str)
def test_a_question_without_all_its_candidates_is_left_out_and_counted(scored):
    whole = [(5, 0), (5, 1), (5, 2)]
    result = ranked(*keys(*scored, *whole, candidates=3))
    assert [q.example for q in result.questions] == [5]
    assert result.incomplete == 1


def test_part_of_a_split_is_never_judged_as_the_whole(tiny_backbone, tmp_path):
    """Batches go from long to short, so a limit may cut off just the last candidate of a question."""
    row = {
        "instruction": "Please choose the correct answer to the question: Where is milk kept?\n\nAnswer1: in the fridge next "
        "to the butter Answer2: in the shed Answer3: no\n\nAnswer format: answer1/answer2/answer3",
        "input": "",
        "output": "the correct answer is answer1",
        "answer": "answer1",
    }
    path = tmp_path / "milk.json"
    path.write_text(json.dumps([row]))
    data = tiny_data(tiny_backbone, test=[str(path)], eval_batch_size=1)
    report = EvaluationReport()
    trainer = tiny_trainer(tmp_path, report, limit_test_batches=2)
    trainer.test(tiny_module(tiny_backbone), datamodule=data, verbose=False)
    assert (report.result.questions, report.result.incomplete) == ((), 1)


def test_a_single_candidate_is_ranked(tiny_backbone):
    data = tiny_data(tiny_backbone)
    data.setup("test")
    batch = data._table("test").batch([(0, 0)], "response") | {"candidate_counts": torch.tensor([1])}
    batch["gold_ids"] = torch.tensor([0])
    ranking = OptionRanking()
    ranking.update(batch, torch.tensor([-2.0]), torch.tensor([3]))
    assert ranked(*ranking.compute()).questions[0].log_likelihoods == (-2.0,)
