"""Reading the answer out of generated text: by the published keywords, or by an option's own words."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Reading(NamedTuple):
    """What a generated text answers, and which of the candidates that is."""

    answer: str | None
    """The answer as it was read; None where the text holds none."""

    choice: int | None
    """The candidate's number; None where the answer is none of them, or there is no answer."""


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
"""What answers a task, whatever a question's own number of options (LLM-Adapters, Hu et al., EMNLP 2023)."""


def first_keyword(text: str, labels: Sequence[str]) -> int | None:
    """Index in ``labels`` of the first keyword in ``text``; None without one, or when it is none of the ``labels``.

    The keywords are those of the published family that holds all the labels, else the labels themselves. As published,
    case counts and a keyword may stand inside a word: "answer12" reads as answer1, and on a question of four options
    "answer5 or answer2" is a wrong answer, not answer2.

    Raises ValueError for an empty label, which every text would contain.
    """
    if not all(labels):
        raise ValueError(
            f"labels: {list(labels)} has an empty one; accepted: texts of at least one character"
        )
    published = next((keywords for keywords in KEYWORDS.values() if set(labels) <= set(keywords)), None)
    keywords = published or sorted(
        labels, key=len, reverse=True
    )  # a regex takes the first that fits: choice10 before choice1
    found = re.search("|".join(map(re.escape, keywords)), text)
    return labels.index(found[0]) if found and found[0] in labels else None


def matching_option(text: str, options: Sequence[str]) -> int | None:
    """Index of the one option that the first non-empty line of ``text`` states, up to case, white space and a full stop.

    None when it states no option, or one that reads the same as another.
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    same = [index for index, option in enumerate(options) if _plain(option) == _plain(line)]
    return same[0] if len(same) == 1 else None


def _plain(text: str) -> str:
    """``" In  the Fridge. "`` -> ``"in the fridge"``."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
