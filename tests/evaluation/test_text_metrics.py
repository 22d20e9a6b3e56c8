"""Text metrics: each equals its reference library called directly, or says why it is not available."""

import math
import re
import sys
from collections import Counter

import nltk
import pytest
import sacrebleu
import torch
from nltk.corpus.reader import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import bert_score as torchmetrics_bert_score

from gatera_lightning.evaluation.text_metrics import (
    CORPUS_METRICS,
    EXAMPLE_METRICS,
    MetricUnavailable,
    bert_score,
    bleu,
    corpus_metrics,
    distinct,
    example_scores,
    meteor,
    rouge_l,
    token_f1,
)

PAIRS = [
    ("i have a dog called miso .", "i have two dogs . one is called miso ."),
    ("No, I don't like the hound!", "no , i do not like dogs"),
    ("yes yes yes", "yes ."),
    ("the sea is far away", "what do you do for a living ?"),
    ("", "nothing was said ."),
    ("it is the same , word for word .", "it is the same , word for word ."),
]
GENERATED, REFERENCES = [list(texts) for texts in zip(*PAIRS, strict=True)]


class TwoWords:
    """A WordNet in which dog and hound are synonyms. NLTK looks up stems, which equal these words."""

    def ensure_loaded(self):
        pass

    def synsets(self, word):
        return [self] if word in ("dog", "hound") else []

    def lemmas(self):
        class Lemma(str):
            def name(self):
                return str(self)

        return [Lemma("dog"), Lemma("hound")]


@pytest.fixture
def wordnet(monkeypatch):
    monkeypatch.setattr("nltk.corpus.wordnet", TwoWords())
    return nltk.corpus.wordnet


@pytest.fixture
def no_wordnet(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    loader = LazyCorpusLoader(
        "wordnet", WordNetCorpusReader, LazyCorpusLoader("omw-1.4", WordNetCorpusReader, None)
    )
    monkeypatch.setattr("nltk.corpus.wordnet", loader)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """The folder of a RoBERTa with three layers and a tokenizer with one token per character."""
    import string

    from tokenizers import Tokenizer, models
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("bert")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate([*special, *string.printable])}, [], unk_token="<unk>")
    )
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
    }
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = RobertaConfig(
            vocab_size=104, max_position_embeddings=520, pad_token_id=1, initializer_range=0.5, **sizes
        )
        RobertaModel(config).save_pretrained(folder)
    return str(folder)


# --- metrics of reference libraries ---


def test_bleu_matches_sacrebleu():
    assert bleu(GENERATED, REFERENCES) == sacrebleu.BLEU().corpus_score(GENERATED, [REFERENCES]).score
    assert 10 < bleu(GENERATED, REFERENCES) < 90
    assert bleu(REFERENCES, REFERENCES) == pytest.approx(100)


def test_rouge_l_matches_rouge_score():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    each = [scorer.score(target=reference, prediction=text)["rougeL"].fmeasure for text, reference in PAIRS]
    assert rouge_l(GENERATED, REFERENCES) == each
    assert rouge_l(["a b c x"], ["a b c d e f"]) == pytest.approx([2 * 3 / (4 + 6)])  # by hand


SCRIPTS = {
    "cyrillic": ("Привет, мир! Как дела?", "Привет, кот! Как дела?"),
    "greek": ("Καλημέρα κόσμε, τι κάνεις", "Καλημέρα γάτα, τι κάνεις"),
    "chinese": ("你好，世界", "你好，猫界"),
    "japanese": ("こんにちは、ネコ", "こんにちは、イヌ"),
    "korean": ("안녕 세상 오늘 날씨", "안녕 고양이 오늘 날씨"),
    "hindi": ("नमस्ते दुनिया कैसी हो", "नमस्ते बिल्ली कैसी हो"),
    "tamil": ("வணக்கம் உலகம் எப்படி இருக்கிறாய்", "வணக்கம் பூனை எப்படி இருக்கிறாய்"),
    "arabic": ("مرحبا بالعالم كيف حالك", "مرحبا بالقط كيف حالك"),
    "hebrew": ("שָׁלוֹם עולם מה שלומך", "שָׁלוֹם חתול מה שלומך"),
    "thai": ("สวัสดีโลก", "สวัสดีแมว"),
    "burmese": ("မင်္ဂလာပါ", "မင်္ဂလာညနေ"),
    "tibetan": ("བཀྲ་ཤིས་བདེ་ལེགས", "བཀྲ་ཤིས་བདེ་མོ"),
    "decomposed": ("cafe\u0301 a\u0300 Paris, un deux", "caf\u00e9 \u00e0 Lyon, un deux"),
}


@pytest.mark.parametrize(("text", "other"), SCRIPTS.values(), ids=SCRIPTS)
def test_metrics_know_words_of_any_script(text, other):
    """A text is equal to itself, and close to another text that shares some of its words."""
    for metric in (rouge_l, token_f1):
        assert metric([text], [text]) == [1.0]
        assert 0.3 < metric([other], [text])[0] < 1.0
    assert distinct([text, text], 1) == 0.5 * distinct([text], 1)
    assert bleu([text], [text]) == pytest.approx(100)


def test_metrics_of_characters_by_hand():
    """One of four characters differs: all metrics count characters where a script has no spaces."""
    assert rouge_l(["我有狗。"], ["我有猫，"]) == token_f1(["我有狗。"], ["我有猫，"]) == [2 * 2 / (3 + 3)]
    assert distinct(["哈哈哈", "哈"], 1) == 1 / 4
    assert bleu(["我有一只狗"], ["我有一只猫"]) == pytest.approx(
        sacrebleu.corpus_bleu(["我有一只狗"], [["我有一只猫"]], tokenize="zh").score
    )


def test_meteor_separates_characters(wordnet):
    """Equal texts of n words in one chunk score 1 - 0.5 / n³."""
    assert meteor(["你好世界"], ["你好世界"]) == pytest.approx([1 - 0.5 / 4**3])


@pytest.mark.parametrize("text", ["", "!?", "。", "😀 ❤️", "\u0301"])
def test_rouge_l_of_texts_without_words_is_zero(text):
    assert rouge_l([text], [text]) == [0.0]


def test_meteor_matches_nltk(wordnet):
    """Punctuation and contractions are separate tokens."""
    words = [
        ("i have a dog called miso .", "i have two dogs . one is called miso ."),
        ("No , I do n't like the hound !", "no , i do not like dogs"),
        *PAIRS[2:],
    ]
    each = [meteor_score([reference.split()], text.split(), wordnet=wordnet) for text, reference in words]
    assert meteor(GENERATED, REFERENCES) == each
    assert meteor(["the hound"], ["the dog"]) > meteor(["the horse"], ["the dog"])  # because of the synonym


@pytest.mark.parametrize("layer", [1, 2])
def test_bert_score_matches_torchmetrics(layer, tiny_bert):
    """Called for each pair, see the next test. A text without tokens scores 0, as in the authors' package."""
    names = ("precision", "recall", "f1")
    each: dict[str, list[float]] = {name: [] for name in names}
    for text, reference in PAIRS:
        direct = torchmetrics_bert_score([text], [reference], model_name_or_path=tiny_bert, num_layers=layer)
        assert text or math.isnan(direct["precision"])
        for name in names:
            each[name].append(float(direct[name]) if text else 0.0)
    found = bert_score(GENERATED, REFERENCES, model=tiny_bert, layer=layer)
    assert found == {f"bert_score_{name}": pytest.approx(values) for name, values in each.items()}
    assert found["bert_score_precision"] != pytest.approx(found["bert_score_recall"], abs=1e-4)
    same = bert_score(REFERENCES, REFERENCES, model=tiny_bert, layer=layer)
    assert same["bert_score_f1"] == pytest.approx([1] * 6, abs=1e-5)


def test_bert_score_compares_matching_pairs(tiny_bert):
    """Sorting the texts by length permutes them in a cycle, and the references differently."""
    texts, references = ["abcdefgh", "xy", "klmn"], ["abc", "xy or other", "klmn !"]
    each = [
        bert_score([a], [b], model=tiny_bert, layer=1)["bert_score_f1"][0]
        for a, b in zip(texts, references, strict=True)
    ]
    assert bert_score(texts, references, model=tiny_bert, layer=1)["bert_score_f1"] == pytest.approx(each)


def test_bert_score_truncates_long_texts(tiny_bert):
    assert 0 < bert_score(["long " * 110], ["short"], model=tiny_bert, layer=1)["bert_score_f1"][0] < 1


# --- metrics without a library ---


def _parlai_f1(text, reference):
    """``F1Metric`` of ParlAI, from its description."""

    def normalized(text):
        text = re.sub(r"[!\"#$%&()*+,-./:;<=>?@\[\]\\^`{|}~_']", " ", text.lower())
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    found, wanted = normalized(text), normalized(reference)
    common = sum((Counter(found) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def test_token_f1_matches_parlai():
    assert token_f1(GENERATED, REFERENCES) == pytest.approx([_parlai_f1(*pair) for pair in PAIRS])
    assert token_f1(["the Dog's", "yes yes"], ["a dog 's bone .", "yes"]) == pytest.approx(
        [2 * 2 / (2 + 3), 2 / 3]
    )
    assert token_f1(["the", "", "..."], ["a", "", "!"]) == [0.0, 0.0, 0.0]


def test_distinct_counts_ngrams_of_all_texts():
    """By hand: i am here; i am here too; nothing; here. 8 words, 4 different; 5 pairs, 3 different."""
    texts = ["i am here", "I am the here, too .", "", "Here!"]
    assert distinct(texts, 1) == 4 / 8
    assert distinct(texts, 2) == 3 / 5
    assert distinct(texts, 4) == 1 / 1
    assert distinct(["", "one"], 2) == 0.0


# --- all metrics, and missing ones ---


def test_all_metrics_are_computed(wordnet, tiny_bert):
    found = example_scores(GENERATED, REFERENCES, bert_model=tiny_bert, bert_layer=2)
    assert found.skipped == {}
    assert found.values == {
        "token_f1": token_f1(GENERATED, REFERENCES),
        "rouge_l": rouge_l(GENERATED, REFERENCES),
        "meteor": meteor(GENERATED, REFERENCES),
        **bert_score(GENERATED, REFERENCES, model=tiny_bert, layer=2),
    }
    assert list(found.values) == list(EXAMPLE_METRICS)
    assert all(isinstance(value, float) for values in found.values.values() for value in values)
    values = {
        "bleu": bleu(GENERATED, REFERENCES),
        "distinct_1": distinct(GENERATED, 1),
        "distinct_2": distinct(GENERATED, 2),
    }
    assert corpus_metrics(GENERATED, REFERENCES) == (values, {})
    assert list(values) == list(CORPUS_METRICS)


def test_example_scores_skip_unavailable_metrics(no_wordnet):
    found = example_scores(GENERATED, REFERENCES, bert_model="owner/not-a-model")
    assert found.skipped == {
        "meteor": "NLTK's WordNet is not on this machine: python -m nltk.downloader wordnet",
        "bert_score": "the model owner/not-a-model is not on this machine: hf download owner/not-a-model",
    }
    assert set(found.values) == {"rouge_l", "token_f1"}


@pytest.mark.parametrize(
    ("module", "package", "metric"),
    [
        ("sacrebleu", "sacrebleu", bleu),
        ("rouge_score.rouge_scorer", "rouge-score", rouge_l),
        ("nltk.corpus", "nltk", meteor),
    ],
)
def test_metrics_name_missing_package(module, package, metric, no_wordnet, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    reason = f"the package {package} is not installed: pip install 'gatera-lightning[text]'"
    with pytest.raises(MetricUnavailable, match=re.escape(reason)):
        metric(GENERATED, REFERENCES)
    skipped = example_scores(GENERATED, REFERENCES, bert_model="owner/not-a-model").skipped
    assert (skipped | corpus_metrics(GENERATED, REFERENCES)[1])[metric.__name__] == reason


@pytest.mark.parametrize("compute", [example_scores, corpus_metrics])
@pytest.mark.parametrize(("generated", "references"), [(["a"], []), (["a"], ["a", "b"])])
def test_metrics_reject_unequal_numbers_of_texts(generated, references, compute):
    message = (
        f"^got {len(generated)} generated texts and {len(references)} references; expected equally many$"
    )
    with pytest.raises(ValueError, match=message):
        compute(generated, references)


def test_metrics_of_empty_texts_are_zero(wordnet, tiny_bert):
    """A model may end every answer at once."""
    found = example_scores(["", ""], ["a dog .", "yes"], bert_model=tiny_bert, bert_layer=1)
    assert found.skipped == {}
    assert [found.values[name] for name in ("token_f1", "rouge_l", "meteor")] == [[0.0, 0.0]] * 3
    assert set(corpus_metrics(["", ""], ["a dog .", "yes"])[0].values()) == {0.0}


def test_metrics_accept_no_texts():
    """As of a rank without examples, and to find out which corpus metrics are available."""
    assert corpus_metrics([], []) == ({"bleu": 0.0, "distinct_1": 0.0, "distinct_2": 0.0}, {})
    assert example_scores([], [], bert_model="owner/not-a-model").values["token_f1"] == []
