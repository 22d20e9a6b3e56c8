"""Parse the chosen option from generated text: by published keywords, or by the option's own text."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from gatera_lightning.errors import checks_arguments


class ParsedAnswer(NamedTuple):
    """The answer found in a generated text, and the candidate that it stands for."""

    answer: str | None
    """The answer; None if the text contains none."""

    choice: int | None
    """Index of the candidate; None if there is no answer, or if it is none of the candidates."""


_ANSWERS = tuple(f"answer{n}" for n in range(1, 6))

KEYWORDS: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "ARC-Easy": _ANSWERS,
    "openbookqa": _ANSWERS,
    "hellaswag": tuple(f"ending{n}" for n in range(1, 5)),
    "winogrande": ("option1", "option2"),
}
"""Answer keywords of each task in LLM-Adapters (Hu et al., EMNLP 2023); a question may have fewer options."""


@checks_arguments
def find_keyword(text: str, labels: Sequence[str]) -> int | None:
    """Find the first answer keyword in a generated text, as LLM-Adapters' evaluation does.

    The keywords are those of the published task that uses all of ``labels``, otherwise the labels themselves.
    Matching is case-sensitive and ignores word boundaries: "answer12" is parsed as "answer1". A keyword that
    is not among the labels is a wrong answer: on a question with four options, "answer5 or answer2" yields
    None.

    Args:
        text: Generated text.
        labels: Labels of the question's options.

    Returns:
        Index of the keyword in ``labels``; None if the text has no keyword, or if the first one is not a
        label.

    Raises:
        ValueError: A label is empty, and would be found in every text.
    """
    if not all(labels):
        raise ValueError(f"labels: {list(labels)} contains an empty one; accepted: non-empty texts")
    published = next((keywords for keywords in KEYWORDS.values() if set(labels) <= set(keywords)), None)
    # A regular expression takes the first alternative that matches: "choice10" has to precede "choice1".
    keywords = published or sorted(labels, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, keywords)), text)
    return labels.index(found[0]) if found and found[0] in labels else None


@checks_arguments
def find_option(text: str, options: Sequence[str]) -> int | None:
    """Find the option whose text is the first non-empty line of a generated text.

    Case, white space and a final period are ignored.

    Args:
        text: Generated text.
        options: Texts of the options.

    Returns:
        Index of the option; None if no option matches, or if several do.
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    matches = [index for index, option in enumerate(options) if _normalize(option) == _normalize(line)]
    return matches[0] if len(matches) == 1 else None


def _normalize(text: str) -> str:
    """``" In  the Fridge. "`` -> ``"in the fridge"``."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
