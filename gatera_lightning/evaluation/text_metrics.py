"""Metrics that compare generated texts with their references, as papers on dialogue report them."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gatera_lightning.evaluation.words import normalized_tokens, spaced, words

Texts = Sequence[str]

EXAMPLE_METRICS = {
    "token_f1": "F1",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "bert_score_precision": "BERTScore P",
    "bert_score_recall": "BERTScore R",
    "bert_score_f1": "BERTScore F1",
}
"""Metrics of a single text, of which the mean is reported: name -> label in tables."""

CORPUS_METRICS = {"bleu": "BLEU", "distinct_1": "distinct-1", "distinct_2": "distinct-2"}
"""Metrics of all texts together: name -> label in tables."""


class _Words:
    """The tokenizer that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


class MetricUnavailable(RuntimeError):
    """A metric needs a package, data or a model that is not installed; the message says how to get it."""


@dataclass(frozen=True)
class ExampleScores:
    """Metrics of single texts.

    Attributes:
        values: Name -> value of each example, (examples,).
        skipped: Metrics that could not be computed -> reason.
    """

    values: dict[str, list[float]]
    skipped: dict[str, str]


def example_scores(
    generated: Texts,
    references: Texts,
    *,
    known: Collection[str] = (),
    bert_model: str = "roberta-large",
    bert_layer: int = 17,
) -> ExampleScores:
    """Compute every available metric of single texts.

    Args:
        generated: Generated texts.
        references: The reference of each text.
        known: Names of metrics that need not be computed again.
        bert_model: Model of BERTScore: the id of a model that was downloaded before, or a folder.
        bert_layer: Its layer whose hidden states are compared; 17 is the best one for roberta-large according
            to the authors of BERTScore.

    Raises:
        ValueError: The numbers of texts differ.
    """
    _check_pairs(generated, references)
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
            except MetricUnavailable as reason:
                skipped[name] = str(reason)
    return ExampleScores(values, skipped)


def corpus_metrics(generated: Texts, references: Texts) -> tuple[dict[str, float], dict[str, str]]:
    """Compute every available metric of all texts together.

    Returns:
        Name -> value, and the metrics that could not be computed -> reason.

    Raises:
        ValueError: The numbers of texts differ.
    """
    _check_pairs(generated, references)
    values = {f"distinct_{n}": distinct(generated, n) for n in (1, 2)}
    try:
        return {"bleu": bleu(generated, references)} | values, {}
    except MetricUnavailable as reason:
        return values, {"bleu": str(reason)}


def token_f1(generated: Texts, references: Texts) -> list[float]:
    """F1 of the words that each text shares with its reference, 0 to 1, as ConvAI2 computes it.

    With the multisets of words G and R (:func:`~gatera_lightning.evaluation.words.normalized_tokens`),
    ``F1 = 2 |G ∩ R| / (|G| + |R|)``; 0 if either text has no words. Source: ``F1Metric`` of ParlAI.
    """
    _check_pairs(generated, references)
    scores = []
    for text, reference in zip(generated, references, strict=True):
        found, wanted = normalized_tokens(text), normalized_tokens(reference)
        shared = sum((Counter(found) & Counter(wanted)).values())
        scores.append(2 * shared / (len(found) + len(wanted)) if shared else 0.0)
    return scores


def rouge_l(generated: Texts, references: Texts) -> list[float]:
    """ROUGE-L F-measure of each text, 0 to 1, without stemming, by the package rouge-score.

    With the longest common subsequence of words LCS(G, R), ``ROUGE-L = 2 LCS / (|G| + |R|)``; 0 if either
    text has no words, even if the texts are equal. The words are those of
    :func:`~gatera_lightning.evaluation.words.words`: the package's own rule knows ASCII letters and digits
    alone. Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries".
    """
    _check_pairs(generated, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing_package("rouge-score") from error
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(generated, references, strict=True)
    return [float(scorer.score(reference, text)["rougeL"].fmeasure) for text, reference in pairs]


def meteor(generated: Texts, references: Texts) -> list[float]:
    """METEOR of each text, 0 to 1, over the word tokens of NLTK; needs NLTK's WordNet.

    In scripts without spaces between words, every character is a word
    (:func:`~gatera_lightning.evaluation.words.spaced`).

    Source: Banerjee and Lavie 2005, "METEOR: an automatic metric for MT evaluation with improved correlation
    with human judgments".
    """
    _check_pairs(generated, references)
    try:
        from nltk.corpus import wordnet
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise _missing_package("nltk") from error
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise MetricUnavailable(
            "NLTK's WordNet is not on this machine: python -m nltk.downloader wordnet"
        ) from error
    tokenize = NLTKWordTokenizer().tokenize
    pairs = zip(generated, references, strict=True)
    return [
        float(single_meteor_score(tokenize(spaced(reference)), tokenize(spaced(text)), wordnet=wordnet))
        for text, reference in pairs
    ]


def bert_score(generated: Texts, references: Texts, *, model: str, layer: int) -> dict[str, list[float]]:
    """BERTScore precision, recall and F1 of each text, without baseline rescaling, by torchmetrics.

    Source: Zhang et al., ICLR 2020, "BERTScore: evaluating text generation with BERT".
    """
    _check_pairs(generated, references)
    import torch
    from torchmetrics.functional.text import bert_score as torchmetrics_bert_score
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        bert = AutoModel.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MetricUnavailable(f"the model {model} is not on this machine: hf download {model}") from error
    settings: dict[str, Any] = {
        "model": bert,
        "user_tokenizer": tokenizer,
        "num_layers": layer,
        "truncation": True,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    # One pair per call: torchmetrics 1.9 sorts both sides by length and then pairs wrong texts (issue 2728).
    found: list[dict[str, Any]] = [
        torchmetrics_bert_score([text], [reference], **settings)
        for text, reference in zip(generated, references, strict=True)
    ]
    # A text without tokens has no cosines: torchmetrics returns NaN, the authors' package 0.
    return {
        f"bert_score_{name}": [float(scores[name].nan_to_num(0.0)) for scores in found]
        for name in ("precision", "recall", "f1")
    }


def bert_layer_problem(model: str, layer: int) -> str:
    """What is wrong with a layer of a BERTScore model; empty if nothing is, or if there is no such model."""
    from transformers import AutoConfig

    try:
        layers = AutoConfig.from_pretrained(model, local_files_only=True).num_hidden_layers
    except (OSError, ValueError):
        return ""
    return "" if layer <= layers else f"{layer}; {model} has {layers} layers, accepted: 1 to {layers}"


def bleu(generated: Texts, references: Texts) -> float:
    """Corpus BLEU, 0 to 100, with the tokenization (13a) and the smoothing of sacrebleu; 0 without texts.

    In scripts without spaces between words, every character is a token, as in sacrebleu's ``zh``
    (:func:`~gatera_lightning.evaluation.words.spaced`).

    Source: Post, WMT 2018, arXiv 1804.08771.
    """
    _check_pairs(generated, references)
    try:
        import sacrebleu
    except ImportError as error:
        raise _missing_package("sacrebleu") from error
    if not generated:
        return 0.0
    return float(sacrebleu.corpus_bleu(list(map(spaced, generated)), [list(map(spaced, references))]).score)


def distinct(generated: Texts, n: int) -> float:
    """Number of different n-grams over the number of all n-grams, in all texts together; 0 without n-grams.

    Source: Li et al., NAACL 2016, arXiv 1510.03055.
    """
    _check_texts("generated", generated)
    grams = Counter[tuple[str, ...]]()
    for text in generated:
        tokens = normalized_tokens(text)
        grams.update(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    return len(grams) / max(1, grams.total())


def _check_texts(name: str, texts: Any) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"{name} is {texts!r:.60}; accepted: a list of texts")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{name} has {wrong[0]!r:.60}; accepted: texts")


def _check_pairs(generated: Texts, references: Texts) -> None:
    _check_texts("generated", generated)
    _check_texts("references", references)
    if len(generated) != len(references):
        raise ValueError(
            f"got {len(generated)} generated texts and {len(references)} references; expected equally many"
        )


def _missing_package(package: str) -> MetricUnavailable:
    return MetricUnavailable(f"the package {package} is not installed: pip install 'gatera-lightning[text]'")
