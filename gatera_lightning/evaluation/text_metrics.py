"""How close generated texts come to their references, by the metrics that dialogue papers report."""

import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

Texts = Sequence[str]

_SPACED_PUNCTUATION = str.maketrans({character: " " for character in string.punctuation})
_ARTICLES = {"a", "an", "the"}


class Unavailable(RuntimeError):
    """A metric whose library, data or model is not on this machine; says which, and how to get it."""


ROW_METRICS = {
    "token_f1": "F1",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "bert_score_precision": "BERTScore P",
    "bert_score_recall": "BERTScore R",
    "bert_score_f1": "BERTScore F1",
}
"""Metrics of one text, which are averaged, by what tables call them."""

CORPUS_METRICS = {"bleu": "BLEU", "distinct_1": "distinct-1", "distinct_2": "distinct-2"}
"""Metrics of many texts together."""


@dataclass(frozen=True)
class RowScores:
    """Every row's metrics by name, (rows,) each, and for every metric that could not be computed the reason why not."""

    values: dict[str, list[float]]
    skipped: dict[str, str]


def row_scores(
    generated: Texts,
    references: Texts,
    *,
    known: Collection[str] = (),
    bert_model: str = "roberta-large",
    bert_layer: int = 17,
) -> RowScores:
    """Every metric that rows have and that is not ``known``, of ``generated``, row by row against ``references``.

    ``bert_model`` is a hub id that was downloaded before, or a folder, and ``bert_layer`` the layer that is compared; 17 is
    what BERTScore's authors found best for roberta-large. Raises ValueError for unequal numbers of texts.
    """
    _check(generated, references)
    metrics: dict[str, Callable[[], dict[str, list[float]]]] = {
        "token_f1": lambda: {"token_f1": token_f1(generated, references)},
        "rouge_l": lambda: {"rouge_l": rouge_l(generated, references)},
        "meteor": lambda: {"meteor": meteor(generated, references)},
        "bert_score": lambda: bert_score(generated, references, model=bert_model, layer=bert_layer),
    }
    values: dict[str, list[float]] = {}
    skipped = {}
    for name, compute in metrics.items():
        if not any(metric.startswith(name) for metric in known):
            try:
                values |= compute()
            except Unavailable as reason:
                skipped[name] = str(reason)
    return RowScores(values, skipped)


def corpus_metrics(generated: Texts, references: Texts) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU, distinct-1 and distinct-2, and for one that could not be computed the reason. Raises ValueError as above."""
    _check(generated, references)
    values = {f"distinct_{n}": distinct(generated, n) for n in (1, 2)}
    try:
        return {"bleu": bleu(generated, references)} | values, {}
    except Unavailable as reason:
        return values, {"bleu": str(reason)}


def _check(generated: Texts, references: Texts) -> None:
    if len(generated) != len(references):
        raise ValueError(
            f"{len(generated)} generated texts and {len(references)} references; accepted: as many"
        )


def bleu(generated: Texts, references: Texts) -> float:
    """Corpus BLEU, 0 to 100, with sacrebleu's tokenisation (13a) and smoothing (Post, WMT 2018, arXiv 1804.08771)."""
    try:
        import sacrebleu
    except ImportError as error:
        raise _missing("sacrebleu") from error
    if not generated:
        return 0.0
    return float(sacrebleu.corpus_bleu(list(generated), [list(references)]).score)


def rouge_l(generated: Texts, references: Texts) -> list[float]:
    """Each text's F measure of the longest common subsequence, 0 to 1, without stemming (Lin, 2004; package rouge-score)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score") from error
    scorer = RougeScorer(["rougeL"])
    pairs = zip(generated, references, strict=True)
    return [float(scorer.score(reference, text)["rougeL"].fmeasure) for text, reference in pairs]


def meteor(generated: Texts, references: Texts) -> list[float]:
    """Each text's METEOR, 0 to 1, over NLTK's word tokens (Banerjee and Lavie, 2005). Needs NLTK's WordNet."""
    try:
        from nltk.corpus import wordnet
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise _missing("nltk") from error
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise Unavailable(
            "NLTK's WordNet is not on this machine: python -m nltk.downloader wordnet"
        ) from error
    words = NLTKWordTokenizer().tokenize
    pairs = zip(generated, references, strict=True)
    return [
        float(single_meteor_score(words(reference), words(text), wordnet=wordnet))
        for text, reference in pairs
    ]


def token_f1(generated: Texts, references: Texts) -> list[float]:
    """Each text's F1 of shared tokens, 0 to 1, as ConvAI2 counts them (ParlAI's ``F1Metric``, :func:`normalised_tokens`)."""
    scores = []
    for text, reference in zip(generated, references, strict=True):
        found, wanted = normalised_tokens(text), normalised_tokens(reference)
        shared = sum((Counter(found) & Counter(wanted)).values())
        scores.append(2 * shared / (len(found) + len(wanted)) if shared else 0.0)
    return scores


def distinct(generated: Texts, n: int) -> float:
    """Different n-grams of all texts over n-grams of all texts (Li et al., NAACL 2016, arXiv 1510.03055); 0 without any."""
    grams = Counter[tuple[str, ...]]()
    for text in generated:
        tokens = normalised_tokens(text)
        grams.update(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    return len(grams) / max(1, grams.total())


def bert_score(generated: Texts, references: Texts, *, model: str, layer: int) -> dict[str, list[float]]:
    """Each text's BERTScore precision, recall and F1, not rescaled (Zhang et al., ICLR 2020; torchmetrics)."""
    import torch
    from torchmetrics.functional.text import bert_score as scores_of
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        bert = AutoModel.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise Unavailable(f"the model {model} is not on this machine: hf download {model}") from error
    settings: dict[str, Any] = {
        "model": bert,
        "user_tokenizer": tokenizer,
        "num_layers": layer,
        "truncation": True,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    # One pair a call: torchmetrics 1.9 sorts both sides by length and matches up the wrong rows (its issue 2728).
    found: list[dict[str, Any]] = [
        scores_of([text], [reference], **settings)
        for text, reference in zip(generated, references, strict=True)
    ]
    # A text without tokens has no cosines: torchmetrics says nan, the authors' package 0.
    return {
        f"bert_score_{name}": [float(scores[name].nan_to_num(0.0)) for scores in found]
        for name in ("precision", "recall", "f1")
    }


def bert_problem(model: str, layer: int) -> str:
    """What is wrong with a layer of a model that is on this machine; empty if nothing is, or if there is no model."""
    from transformers import AutoConfig

    try:
        layers = AutoConfig.from_pretrained(model, local_files_only=True).num_hidden_layers
    except (OSError, ValueError):
        return ""
    return "" if layer <= layers else f"{layer}; {model} has {layers} layers, accepted: 1 to {layers}"


def normalised_tokens(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as ParlAI's ``normalize_answer`` has them.

    >>> normalised_tokens("I have a dog; it's THE best!")
    ['i', 'have', 'dog', 'it', 's', 'best']
    """
    return [token for token in text.lower().translate(_SPACED_PUNCTUATION).split() if token not in _ARTICLES]


def _missing(package: str) -> Unavailable:
    return Unavailable(f"the package {package} is not installed: pip install 'gatera-lightning[text]'")
