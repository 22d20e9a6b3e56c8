"""Texts that are neither right nor wrong: what ``test`` writes of them equals the reference libraries, called directly."""

import json
import re
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

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
from gatera_lightning.datamodules import DialogueDataModule, InstructionDataModule
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation import text_metrics

SKIPPED = {
    "meteor": "NLTK's WordNet is not on this machine: python -m nltk.downloader wordnet",
    "bert_score": "the model roberta-large is not on this machine: hf download roberta-large",
}


class NoWords:
    """A WordNet that has come, and in which no word has another one for it."""

    def ensure_loaded(self):
        pass

    def synsets(self, word):
        return []


@pytest.fixture(autouse=True)
def wordnet(monkeypatch):
    """This machine has no WordNet; ``wordnet()`` brings one."""
    monkeypatch.setattr(nltk.data, "path", [])
    absent = LazyCorpusLoader(
        "wordnet", WordNetCorpusReader, LazyCorpusLoader("omw-1.4", WordNetCorpusReader, None)
    )
    monkeypatch.setattr("nltk.corpus.wordnet", absent)

    def come():
        monkeypatch.setattr("nltk.corpus.wordnet", NoWords())

    return come


def replies():
    """The replies of the sample's first two conversations; a line is ``N partner TAB reply TAB TAB candidates``."""
    lines = (SAMPLES.parent / "smalltalk" / "test.txt").read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("1 ")]
    return [line.split("\t")[1] for line in lines[: starts[2]] if "\t" in line]


REFERENCES = replies()
WRITTEN = [
    REFERENCES[0],
    " ".join(REFERENCES[1].split()[:-4]),
    "",
    f"  {REFERENCES[4].upper()}!\n",
    " ".join(reversed(REFERENCES[4].split())),
    REFERENCES[6],
    "i\u2028am | a [carpenter]",
    " ".join(REFERENCES[7].split()[::2]) + " yes yes",
]
TEXTS = [text.strip() for text in WRITTEN]


@pytest.fixture
def asked(monkeypatch, tiny_backbone):
    """The model writes WRITTEN; the list fills with the examples that it was asked for."""
    tokenizer, seen = AutoTokenizer.from_pretrained(tiny_backbone), []

    def generate(model, batch, config, *, in_step):
        examples = [example for example in batch["example_ids"].tolist() if example >= 0]
        seen.extend(examples)
        said = [tokenizer(WRITTEN[i] if i >= 0 else "x").input_ids for i in batch["example_ids"].tolist()]
        width = 1 + max(map(len, said))
        return torch.tensor(
            [ids + [batch["eos_id"]] + [batch["pad_id"]] * (width - 1 - len(ids)) for ids in said]
        )

    monkeypatch.setattr("gatera_lightning.training.evaluation_steps.generate", generate)
    return seen


@pytest.fixture(scope="module")
def module(tiny_backbone):
    return tiny_module(tiny_backbone)


def evaluate(
    module, folder, *callbacks, verb="test", evaluate_by=("generation",), report=None, batch=3, **limits
):
    """One run on a folder: its report, and the metrics that were logged."""
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
    found = getattr(trainer, verb)(module, datamodule=data, **({"verbose": False} if verb == "test" else {}))
    return report, {
        name: value for part in found or [] for name, value in part.items()
    } if verb == "test" else None


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]


def summary_of(folder):
    return json.loads((folder / "test_results.json").read_text())


def parlai_f1(text, reference):
    """ParlAI's F1Metric, from its description."""

    def words(text):
        text = re.sub(r"[!\"#$%&()*+,-./:;<=>?@\[\]\\^`{|}~_']", " ", text.lower())
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    found, wanted = words(text), words(reference)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


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


def test_every_row_holds_text_reference_and_scores(module, asked, tmp_path):
    evaluate(module, tmp_path)
    rows = lines(tmp_path)
    assert [row["example"] for row in rows] == sorted(asked) == list(range(8))
    for row, text, reference, scores in zip(rows, TEXTS, REFERENCES, expected_scores(), strict=True):
        assert list(row) == ["task", "example", "key", "gold", "generation"]
        assert list(row["generation"]) == ["text", "reference", "scores"]
        assert (row["generation"]["text"], row["generation"]["reference"]) == (text, reference)
        assert row["generation"]["scores"] == pytest.approx(scores)
    assert (
        len({round(scores["token_f1"], 3) for scores in expected_scores()}) > 4
    )  # else a mix-up would not show


def test_the_results_are_those_of_the_libraries(module, asked, tmp_path, capsys):
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


def test_ranked_and_generated_replies_are_reported_together(module, asked, tmp_path, capsys):
    _, logged = evaluate(module, tmp_path, evaluate_by=("likelihood", "generation"), batch=40)
    out, summary = capsys.readouterr().out, summary_of(tmp_path)
    assert "hits@1 [95 % interval]" in out
    assert "generated texts compared with their references" in out
    assert set(summary["tasks"]["smalltalk"]) == {"sum", "per_token", "per_character", "text"}
    assert summary["text"] == pytest.approx(expected_metrics())
    accuracies = {f"test/accuracy_{name}" for name in ("sum", "per_token", "per_character")}
    assert set(logged) == {"test/loss", *accuracies, *(f"test/{name}" for name in expected_metrics())}
    assert all(list(row)[4:] == ["likelihood", "generation"] for row in lines(tmp_path))


def test_a_metric_whose_data_have_come_is_added_without_generating_again(
    module, asked, wordnet, tmp_path, capsys
):
    evaluate(module, tmp_path)
    before, wrote = summary_of(tmp_path), lines(tmp_path)
    assert "skipped meteor" in capsys.readouterr().out
    del asked[:]
    wordnet()
    _, logged = evaluate(module, tmp_path)
    after = summary_of(tmp_path)
    assert asked == []
    each = [
        meteor_score([reference.split()], nltk.tokenize.NLTKWordTokenizer().tokenize(text), wordnet=NoWords())
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
    for row, old in zip(lines(tmp_path), wrote, strict=True):
        del row["generation"]["scores"]["meteor"]
        assert row == old


def test_results_that_did_not_change_are_not_written_again(module, asked, tmp_path, capsys):
    evaluate(module, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    first = capsys.readouterr().out
    evaluate(module, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert capsys.readouterr().out == first


class Killed(Exception):
    pass


class Killer(L.Callback):
    """Dies before the batch after ``at`` of them is written."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def on_test_batch_end(self, *_):
        self.seen += 1
        if self.seen > self.at:
            raise Killed


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_that_was_killed_ends_with_the_same_files(module, asked, tmp_path, at):
    evaluate(module, tmp_path / "whole")
    with pytest.raises(Killed):
        evaluate(module, tmp_path / "killed", Killer(at))
    del asked[:]
    evaluate(module, tmp_path / "killed")
    assert len(asked) == 8 - 3 * at
    assert (tmp_path / "killed" / "predictions.jsonl").read_bytes() == (
        tmp_path / "whole" / "predictions.jsonl"
    ).read_bytes()
    found, expected = summary_of(tmp_path / "killed"), summary_of(tmp_path / "whole")
    assert {name: found[name] for name in ("text", "tasks", "rows")} == {
        name: expected[name] for name in ("text", "tasks", "rows")
    }
    assert (found["resumed_predictions"], found["computed_predictions"]) == (3 * at, 8 - 3 * at)


def test_predict_writes_the_same_lines(module, asked, tmp_path):
    evaluate(module, tmp_path / "test")
    evaluate(module, tmp_path / "predict", verb="predict")
    assert (tmp_path / "predict" / "predictions.jsonl").read_bytes() == (
        tmp_path / "test" / "predictions.jsonl"
    ).read_bytes()


def test_a_limit_scores_the_texts_that_there_are(module, asked, tmp_path, capsys):
    evaluate(module, tmp_path, limit_test_batches=1)
    rows = lines(tmp_path)
    assert [row["example"] for row in rows] == sorted(asked)
    assert len(rows) == 3
    assert summary_of(tmp_path)["text"]["token_f1"] == pytest.approx(
        mean([expected_scores()[i]["token_f1"] for i in sorted(asked)])
    )
    assert "generation: only 3 of 8 examples" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_score_a_share_each(monkeypatch, rank):
    """Eight texts, four on each; one process lacks a package, so nobody's text has its score, and the report says why."""
    other = text_metrics.example_scores(TEXTS[1 - rank :: 2], REFERENCES[1 - rank :: 2])
    other = text_metrics.ExampleScores(
        {"token_f1": other.values["token_f1"]}, other.skipped | {"rouge_l": "no package here"}
    )
    gathered = []

    def from_every_rank(own):
        gathered.append(own)
        return [own, other] if rank == 0 else [other, own]

    monkeypatch.setattr("gatera_lightning.callbacks.evaluation_report._from_every_rank", from_every_rank)
    generations = [
        {"text": text, "reference": reference} for text, reference in zip(TEXTS, REFERENCES, strict=True)
    ]
    trainer = SimpleNamespace(global_rank=rank, world_size=2)
    skipped = EvaluationReport()._compare_texts(trainer, generations)
    assert [len(values) for own in gathered for values in own.values.values()] == [4, 4]
    assert [found["scores"] for found in generations] == [
        {"token_f1": pytest.approx(scores["token_f1"])} for scores in expected_scores()
    ]
    assert skipped == SKIPPED | {"rouge_l": "no package here"}


def test_bert_score_takes_the_model_and_layer_that_are_set(module, asked, tmp_path, monkeypatch):
    wanted = []

    def bert_score(generated, references, *, model, layer):
        wanted.append((list(generated), list(references), model, layer))
        return {
            f"bert_score_{name}": [float(len(text)) for text in generated]
            for name in ("precision", "recall", "f1")
        }

    monkeypatch.setattr(text_metrics, "bert_score", bert_score)
    evaluate(module, tmp_path, report=EvaluationReport(str(tmp_path), bert_model="./bert", bert_layer=2))
    assert wanted == [(TEXTS, REFERENCES, "./bert", 2)]
    summary = summary_of(tmp_path)
    assert summary["text"]["bert_score_recall"] == mean([len(text) for text in TEXTS])
    assert set(summary["text_skipped"]) == {"meteor"}


def test_what_the_model_really_writes_is_compared(module, tiny_backbone, tmp_path, monkeypatch):
    """Own data, nothing faked: three tokens of a model that knows nothing, against the response of its row."""
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
    assert report.result.measures == []  # one response a row
    assert summary_of(tmp_path)["text"]["bleu"] == pytest.approx(
        sacrebleu.BLEU().corpus_score([found["text"] for found in generations], [responses]).score
    )


def test_a_layer_that_the_model_does_not_have_is_said_before_anything_is_computed(tiny_backbone, tmp_path):
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
