"""Tests of scores of generated texts against references: they match the metric libraries, called directly."""

import json
import re
from collections import Counter
from itertools import pairwise

import lightning as L
import nltk
import pytest
import sacrebleu
import torch
from nltk.corpus.reader import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from tiny_backbone import SAMPLES, tiny_module, tiny_trainer
from transformers import AutoTokenizer

from gatera_lightning import BackboneConfig
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.callbacks.text_scoring import score_texts
from gatera_lightning.datamodules import DialogueDataModule, InstructionDataModule
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation import text_metrics

SKIPPED = {
    "meteor": "NLTK's WordNet is not on this machine: python -m nltk.downloader wordnet",
    "bert_score": "the model roberta-large is not on this machine: hf download roberta-large",
}


class WordNetWithoutSynonyms:
    """A WordNet that is installed and contains no synonyms."""

    def ensure_loaded(self):
        pass

    def synsets(self, word):
        return []


@pytest.fixture(autouse=True)
def wordnet(monkeypatch):
    """Remove WordNet; ``wordnet()`` installs one."""
    monkeypatch.setattr(nltk.data, "path", [])
    absent = LazyCorpusLoader(
        "wordnet", WordNetCorpusReader, LazyCorpusLoader("omw-1.4", WordNetCorpusReader, None)
    )
    monkeypatch.setattr("nltk.corpus.wordnet", absent)

    def install():
        monkeypatch.setattr("nltk.corpus.wordnet", WordNetWithoutSynonyms())

    return install


def replies():
    """The replies of two sample conversations; lines are ``N partner TAB reply TAB TAB candidates``."""
    lines = (SAMPLES.parent / "smalltalk" / "test.txt").read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("1 ")]
    return [line.split("\t")[1] for line in lines[: starts[2]] if "\t" in line]


REFERENCES = replies()
GENERATED = [
    REFERENCES[0],
    " ".join(REFERENCES[1].split()[:-4]),
    "",
    f"  {REFERENCES[4].upper()}!\n",
    " ".join(reversed(REFERENCES[4].split())),
    REFERENCES[6],
    "i\u2028am | a [carpenter]",
    " ".join(REFERENCES[7].split()[::2]) + " yes yes",
]
TEXTS = [text.strip() for text in GENERATED]


@pytest.fixture
def generated_examples(monkeypatch, tiny_backbone):
    """Let the model generate GENERATED; returns the examples for which it was called."""
    tokenizer, seen = AutoTokenizer.from_pretrained(tiny_backbone), []

    def generate(model, batch, config, *, in_step):
        examples = [example for example in batch["example_ids"].tolist() if example >= 0]
        seen.extend(examples)
        responses = [
            tokenizer(GENERATED[i] if i >= 0 else "x").input_ids for i in batch["example_ids"].tolist()
        ]
        width = 1 + max(map(len, responses))
        return torch.tensor(
            [ids + [batch["eos_id"]] + [batch["pad_id"]] * (width - 1 - len(ids)) for ids in responses]
        )

    monkeypatch.setattr("gatera_lightning.training.evaluation_steps.generate", generate)
    return seen


@pytest.fixture(scope="module")
def module(tiny_backbone):
    return tiny_module(tiny_backbone)


def evaluate(
    module, folder, *callbacks, subcommand="test", evaluate_by=("generation",), report=None, batch=3, **limits
):
    """Run an evaluation in a folder; returns the report and the logged metrics."""
    report = report or EvaluationReport(str(folder))
    data = DialogueDataModule(
        template="plain",
        train_on="response",
        max_length=400,
        test=["smalltalk[:2]"],
        eval_batch_size=batch,
        evaluate_by=list(evaluate_by),
    )
    data.connect(load_tokenizer(module.backbone))
    trainer = tiny_trainer(folder, *callbacks, report, **limits)
    found = getattr(trainer, subcommand)(
        module, datamodule=data, **({"verbose": False} if subcommand == "test" else {})
    )
    return report, {
        name: value for part in found or [] for name, value in part.items()
    } if subcommand == "test" else None


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]


def summary_of(folder):
    return json.loads((folder / "test_results.json").read_text())


def parlai_f1(text, reference):
    """ParlAI's F1Metric, written from its description."""

    def words(text):
        text = re.sub(r"[!\"#$%&()*+,-./:;<=>?@\[\]\\^`{|}~_']", " ", text.lower())
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    found, expected = words(text), words(reference)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def expected_scores():
    scorer = RougeScorer(["rougeL"])
    return [
        {"token_f1": parlai_f1(text, reference), "rouge_l": scorer.score(reference, text)["rougeL"].fmeasure}
        for text, reference in zip(TEXTS, REFERENCES, strict=True)
    ]


def mean(values):
    return sum(values) / len(values)


def expected_metrics():
    words = [re.sub(r"[^\w\s\u2028]", " ", text.lower()).split() for text in TEXTS]
    words = [[word for word in text if word not in ("a", "an", "the")] for text in words]
    singles, pairs = (
        [word for text in words for word in text],
        [pair for text in words for pair in pairwise(text)],
    )
    return {name: mean([row[name] for row in expected_scores()]) for name in ("token_f1", "rouge_l")} | {
        "bleu": sacrebleu.BLEU().corpus_score(TEXTS, [REFERENCES]).score,
        "distinct_1": len(set(singles)) / len(singles),
        "distinct_2": len(set(pairs)) / len(pairs),
    }


def test_predictions_have_text_reference_and_scores(module, generated_examples, tmp_path):
    evaluate(module, tmp_path)
    rows = lines(tmp_path)
    assert [row["example"] for row in rows] == sorted(generated_examples) == list(range(8))
    for row, text, reference, scores in zip(rows, TEXTS, REFERENCES, expected_scores(), strict=True):
        assert list(row) == ["task", "example", "key", "gold", "generation"]
        assert list(row["generation"]) == ["text", "reference", "scores"]
        assert (row["generation"]["text"], row["generation"]["reference"]) == (text, reference)
        assert row["generation"]["scores"] == pytest.approx(scores)
    assert (
        len({round(scores["token_f1"], 3) for scores in expected_scores()}) > 4
    )  # otherwise swapped scores would not be noticed


def test_results_match_reference_libraries(module, generated_examples, tmp_path, capsys):
    _, logged = evaluate(module, tmp_path)
    out, summary, expected = capsys.readouterr().out, summary_of(tmp_path), expected_metrics()
    assert summary["text"] == pytest.approx(expected)
    assert summary["tasks"] == {"smalltalk": {"text": summary["text"]}}
    assert logged == pytest.approx({f"test/{name}": value for name, value in expected.items()}, rel=1e-6)
    assert summary["text_skipped"] == SKIPPED
    for metric, reason in SKIPPED.items():
        assert f"skipped {metric}: {reason}" in out
    (values,) = (line for line in out.splitlines() if "smalltalk" in line and "│" in line)
    shown = [cell.strip() for cell in values.split("│")[1:-1]]
    assert shown == ["smalltalk", "8", *(f"{expected[name]:.3f}" for name in expected)]
    assert "accuracy" not in out
    assert "without an answer" not in out
    assert summary["average"] == {}
    assert (summary["resumed_predictions"], summary["computed_predictions"]) == (0, 8)


def test_likelihood_and_generation_are_reported_together(module, generated_examples, tmp_path, capsys):
    _, logged = evaluate(module, tmp_path, evaluate_by=("likelihood", "generation"), batch=40)
    out, summary = capsys.readouterr().out, summary_of(tmp_path)
    assert "hits@1 [95 % interval]" in out
    assert "generated texts compared with their references" in out
    assert set(summary["tasks"]["smalltalk"]) == {"sum", "per_token", "per_character", "text"}
    assert summary["text"] == pytest.approx(expected_metrics())
    accuracies = {f"test/accuracy_{name}" for name in ("sum", "per_token", "per_character")}
    assert set(logged) == {"test/loss", *accuracies, *(f"test/{name}" for name in expected_metrics())}
    assert all(list(row)[4:] == ["likelihood", "generation"] for row in lines(tmp_path))


def test_new_metric_is_added_without_generating_again(module, generated_examples, wordnet, tmp_path, capsys):
    evaluate(module, tmp_path)
    before, earlier = summary_of(tmp_path), lines(tmp_path)
    assert "skipped meteor" in capsys.readouterr().out
    del generated_examples[:]
    wordnet()
    _, logged = evaluate(module, tmp_path)
    after = summary_of(tmp_path)
    assert generated_examples == []
    each = [
        meteor_score(
            [reference.split()],
            nltk.tokenize.NLTKWordTokenizer().tokenize(text),
            wordnet=WordNetWithoutSynonyms(),
        )
        for text, reference in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert [row["generation"]["scores"]["meteor"] for row in lines(tmp_path)] == pytest.approx(each)
    assert 0 < after["text"]["meteor"] == pytest.approx(mean(each))
    assert after["text"] == before["text"] | {"meteor": after["text"]["meteor"]}
    assert set(after["text_skipped"]) == {"bert_score"}
    assert logged["test/meteor"] == pytest.approx(mean(each))
    out = capsys.readouterr().out
    assert "METEOR" in out
    assert "skipped meteor" not in out
    for row, old in zip(lines(tmp_path), earlier, strict=True):
        del row["generation"]["scores"]["meteor"]
        assert row == old


def test_completed_evaluation_leaves_files_unchanged(module, generated_examples, tmp_path, capsys):
    evaluate(module, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    first = capsys.readouterr().out
    evaluate(module, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert capsys.readouterr().out == first


class KilledError(Exception):
    pass


class KillAtBatch(L.Callback):
    """Fails before the predictions of batch ``at`` are written."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def on_test_batch_end(self, *_):
        self.seen += 1
        if self.seen > self.at:
            raise KilledError


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_evaluation_resumes_to_same_files(module, generated_examples, tmp_path, at):
    evaluate(module, tmp_path / "complete")
    with pytest.raises(KilledError):
        evaluate(module, tmp_path / "killed", KillAtBatch(at))
    del generated_examples[:]
    evaluate(module, tmp_path / "killed")
    assert len(generated_examples) == 8 - 3 * at
    assert (tmp_path / "killed" / "predictions.jsonl").read_bytes() == (
        tmp_path / "complete" / "predictions.jsonl"
    ).read_bytes()
    found, expected = summary_of(tmp_path / "killed"), summary_of(tmp_path / "complete")
    assert {name: found[name] for name in ("text", "tasks", "rows")} == {
        name: expected[name] for name in ("text", "tasks", "rows")
    }
    assert (found["resumed_predictions"], found["computed_predictions"]) == (3 * at, 8 - 3 * at)


def test_predict_writes_predictions_of_test(module, generated_examples, tmp_path):
    evaluate(module, tmp_path / "test")
    evaluate(module, tmp_path / "predict", subcommand="predict")
    assert (tmp_path / "predict" / "predictions.jsonl").read_bytes() == (
        tmp_path / "test" / "predictions.jsonl"
    ).read_bytes()


def test_limited_evaluation_scores_existing_texts(module, generated_examples, tmp_path, capsys):
    evaluate(module, tmp_path, limit_test_batches=1)
    rows = lines(tmp_path)
    assert [row["example"] for row in rows] == sorted(generated_examples)
    assert len(rows) == 3
    assert summary_of(tmp_path)["text"]["token_f1"] == pytest.approx(
        mean([expected_scores()[i]["token_f1"] for i in sorted(generated_examples)])
    )
    assert "generation: only 3 of 8 examples" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_score_their_shares(monkeypatch, rank):
    """Eight texts, four on each rank. One rank lacks a package, so no text has its score."""
    other = text_metrics.example_scores(TEXTS[1 - rank :: 2], REFERENCES[1 - rank :: 2])
    other = text_metrics.ExampleScores(
        {"token_f1": other.values["token_f1"]}, other.skipped | {"rouge_l": "no package here"}
    )
    gathered = []

    def gather_objects(own):
        gathered.append(own)
        return [own, other] if rank == 0 else [other, own]

    monkeypatch.setattr("gatera_lightning.callbacks.text_scoring.gather_objects", gather_objects)
    generations = [
        {"text": text, "reference": reference} for text, reference in zip(TEXTS, REFERENCES, strict=True)
    ]
    skipped = score_texts(generations, rank=rank, world_size=2, bert_model="roberta-large", bert_layer=17)
    assert [len(values) for own in gathered for values in own.values.values()] == [4, 4]
    assert [found["scores"] for found in generations] == [
        {"token_f1": pytest.approx(scores["token_f1"])} for scores in expected_scores()
    ]
    assert skipped == SKIPPED | {"rouge_l": "no package here"}


def test_scores_of_an_older_version_are_computed_again():
    """Version 0.1 stored ROUGE-L 0 for all texts in Cyrillic; BERTScore takes long, so it is kept."""
    record = {"text": "Привет, мир", "reference": "Привет, мир", "scores": {"rouge_l": 0.0}}
    record["scores"] |= dict.fromkeys(["bert_score_precision", "bert_score_recall", "bert_score_f1"], 0.5)
    score_texts([record], rank=0, world_size=1, bert_model="roberta-large", bert_layer=17)
    assert record["scores"]["rouge_l"] == record["scores"]["token_f1"] == 1.0
    assert record["scores"]["bert_score_f1"] == 0.5


def test_bert_score_uses_configured_model_and_layer(module, generated_examples, tmp_path, monkeypatch):
    calls = []

    def bert_score(generated, references, *, model, layer):
        calls.append((list(generated), list(references), model, layer))
        return {
            f"bert_score_{name}": [float(len(text)) for text in generated]
            for name in ("precision", "recall", "f1")
        }

    monkeypatch.setattr(text_metrics, "bert_score", bert_score)
    evaluate(module, tmp_path, report=EvaluationReport(str(tmp_path), bert_model="./bert", bert_layer=2))
    assert calls == [(TEXTS, REFERENCES, "./bert", 2)]
    summary = summary_of(tmp_path)
    assert summary["text"]["bert_score_recall"] == mean([len(text) for text in TEXTS])
    assert set(summary["text_skipped"]) == {"meteor"}


def test_generated_text_is_compared_with_response(module, tiny_backbone, tmp_path, monkeypatch):
    """Without mocks: three tokens of an untrained model, against the response of the example."""
    monkeypatch.setattr(module.decoding, "max_new_tokens", 3)
    data = InstructionDataModule(
        template="plain",
        train_on="response",
        max_length=400,
        test=["calendar[:4]"],
        evaluate_by=["likelihood", "generation"],
    )
    data.connect(load_tokenizer(BackboneConfig(id=str(tiny_backbone))))
    report = EvaluationReport(str(tmp_path))
    tiny_trainer(tmp_path, report).test(module, datamodule=data, verbose=False)
    rows = [
        json.loads(line)
        for line in (SAMPLES.parent / "calendar" / "test.jsonl").read_bytes().splitlines()[:4]
    ]
    responses = [row["messages"][-1]["content"] if "messages" in row else row["output"] for row in rows]
    generations = [row["generation"] for row in lines(tmp_path)]
    assert [found["reference"] for found in generations] == responses
    for found in generations:
        assert found["text"] == found["text"].strip() != ""
        assert found["scores"]["token_f1"] == pytest.approx(parlai_f1(found["text"], found["reference"]))
    assert report.result.measures == []  # a single response cannot be ranked
    assert summary_of(tmp_path)["text"]["bleu"] == pytest.approx(
        sacrebleu.BLEU().corpus_score([found["text"] for found in generations], [responses]).score
    )


def test_missing_bert_layer_is_rejected_before_evaluation(tiny_backbone, tmp_path):
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=400, max_position_embeddings=520, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    load_tokenizer(BackboneConfig(id=str(tiny_backbone))).save_pretrained(tmp_path / "bert")
    data = DialogueDataModule(template="plain", train_on="response", max_length=400, test=["smalltalk[:1]"])
    data.evaluate_by = ["generation"]
    data.connect(load_tokenizer(BackboneConfig(id=str(tiny_backbone))))
    module = tiny_module(tiny_backbone)
    report = EvaluationReport(
        str(tmp_path / "folder"), bert_model=str(tmp_path / "bert")
    )  # bert_layer stays 17
    with pytest.raises(
        ConfigError, match=r"evaluation\.bert_layer: 17; .*bert has 3 layers, accepted: 1 to 3$"
    ):
        tiny_trainer(tmp_path, report).test(module, datamodule=data, verbose=False)
