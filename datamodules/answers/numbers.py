r"""Parse the final answer from a worked solution: a number, as an exact fraction, or an option's letter.

Solutions end in ``The answer is: 72`` (MetaMath), ``#### 72`` (GSM8K) or a sentence. Currencies, units and
percent signs (``$3.50``, ``72 clips``, ``50%``) do not count as part of a number's value.
"""

import re
import unicodedata
from fractions import Fraction

from gatera_lightning.errors import checks_arguments

TOLERANCE = Fraction(1, 1000)
"""Largest difference between a correct answer and the number in the data, as in LLM-Adapters."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|(?<![0-9A-Za-z])\.[0-9]+)"
_RATIO = rf"{_DECIMAL} ?/ ?{_DECIMAL}"
_POWER = (
    r"(?:[eE](?P<e>[-+]?[0-9]{1,3})(?![0-9])"
    r"| ?(?:\\times|\\cdot|[×x*]) ?10\^\{?(?P<ten>[-+]?[0-9]{1,3})(?![0-9])\}?)"
)
_NUMBER = re.compile(
    r"(?<![\w{^\\√])(?P<sign>(?<![)\]}%])[-+])?(?:[$£€¥₹] ?)?(?P<inner_sign>(?<=[$£€¥₹])[-+])?"
    rf"(?:(?P<mixed>[0-9]+ )?(?P<ratio>{_RATIO})|(?P<decimal>{_DECIMAL})(?:{_POWER})?)"
)
# What follows a number that is part of an expression.
_EXPRESSION = re.compile(r" ?(?:\\sqrt|√|\\pi|π|\^)|[xyzn](?![A-Za-z0-9])|[eE][-+]?[0-9]")
# What follows or precedes the first number of a conclusion that is part of an expression in variables. A
# single letter is a variable, except where a word follows it ("72 - a dozen").
_OPERATOR = r"(?:[-+*/^·×÷]|\\(?:times|cdot|div|pm)(?![A-Za-z]))"
_VARIABLE = (
    r"(?:[xyzn](?![A-Za-z0-9])|[A-Za-z](?![A-Za-z0-9']| +[A-Za-z])|(?:pi|sqrt)(?![A-Za-z])"
    r"|\\[A-Za-z]+|[√π])"
)
_EXPRESSION_AFTER = re.compile(
    rf" ?(?:(?!/){_OPERATOR} ?{_VARIABLE}|/ ?[xyzn](?![A-Za-z0-9])"
    rf"|[A-Za-z] ?(?!/){_OPERATOR} ?(?:[0-9]|{_VARIABLE})"
    r"|\((?=[^()]*[-+*/^])[^()]*(?<![A-Za-z])[A-Za-z](?![A-Za-z]))"
)
_EXPRESSION_BEFORE = re.compile(
    rf"(?:(?<![A-Za-z0-9'])[A-Za-z]|[0-9²³π)}}\]])(?:{_OPERATOR}| ?{_OPERATOR} )[$(]*\Z|[A-Za-z]\(\Z"
)
# A unit has at least two letters, because a single letter is a variable. "million" is not a unit.
_UNIT = re.compile(
    r" ?[%$£€¥₹°]?(?: ?/?(?! ?(?:hundred|thousand|(?:m|b|tr)illion|dozen)|[abcxyz]{2,3}(?![A-Za-z])) ?"
    r"[A-Za-z][A-Za-z²³/](?:[A-Za-z²³/.' -]|\^\{?[23]\}?)*)?[ .!$*]*"
)
# Texts that introduce a final answer, and which occurrence counts. The order matters: solutions that end in
# "####" may contain "the answer is" in an earlier sentence.
_MARKERS = (
    (re.compile(r"\banswer\s+is\s*:", re.IGNORECASE), -1),  # MetaMath
    (re.compile("####"), 0),  # GSM8K
    (re.compile(r"\banswer\s+is\b", re.IGNORECASE), -1),  # LLM-Adapters
)


@checks_arguments
def parse_number(text: str) -> Fraction | None:
    r"""Parse a text that consists of one number and, at most, its unit.

    Accepts thousands separators, decimals, fractions (``3/4``, ``1 1/2``, ``½``, ``\frac{3}{4}``), powers
    (``1.5e3``, ``3 \times 10^{4}``), any minus sign, currencies (``$``, ``\$``, …), units of at least two
    letters, ``**`` and ``\boxed``. ``50%`` is 50, not 1/2, as in the evaluations of MetaMath and GSM8K, which
    look at the digits alone.

    >>> parse_number("$1,234.50"), parse_number("3/4 cups."), parse_number("3 or 4")
    (Fraction(2469, 2), Fraction(3, 4), None)

    Returns:
        The value; None for several numbers, expressions (``2\sqrt{3}``, ``2x``, ``(3, 4)``), ``3 million``
        and numbers written as words.
    """
    found = _NUMBER.match(_strip(_normalize(text)))
    return None if found is None or not _UNIT.fullmatch(found.string[found.end() :]) else _value(found)


@checks_arguments
def find_final_number(text: str) -> str | None:
    """Find the number that a solution gives as its final answer.

    The number is, in order of precedence:

    1. the first after the last ``The answer is:``, as in MetaMath's evaluation;
    2. the first after the first ``####``, as in GSM8K's;
    3. the first after the last ``The answer is``;
    4. the last number in the text, as in LLM-Adapters' evaluation.

    A marker applies to the rest of its line, or to the next line with text. If no number follows it there, or
    an expression in variables (``n^2+1``, ``5 - x``), the solution has no final number; numbers in front of
    the marker are not considered. Of several numbers (``3 + 4``, ``3 or 4``) the first counts, as in the
    published evaluations.

    Returns:
        The number as it is written in the normalized text; None if there is none.
    """
    text = _normalize(text)
    conclusion = _conclusion(text)
    numbers = list(_NUMBER.finditer(text if conclusion is None else conclusion))
    if not numbers:
        return None
    found = numbers[-1 if conclusion is None else 0]
    if _EXPRESSION.match(found.string, found.end()) or (
        conclusion is not None and _in_expression(conclusion, found)
    ):
        return None
    return found[0].strip()


@checks_arguments
def find_option_letter(text: str, letters: str = "ABCDE") -> str | None:
    """Find the option letter that a solution chooses.

    If the text has a marker (``The answer is:``, ``####``, ``The answer is``), the letter is the first
    isolated one after it, on the same line; letters elsewhere are not considered. Otherwise the letter is, in
    order of precedence, the first one in

    1. ``option B`` or ``choice (B)``;
    2. ``(B)``;
    3. ``B)``;
    4. ``B.``, ``B:`` or ``B`` at the beginning of a line;
    5. any text that isolates it, unless it is the article in ``A train``.

    Args:
        text: A solution.
        letters: The accepted letters, in capitals.

    Returns:
        One of ``letters``; None if the text chooses none of them.
    """
    one = f"[{re.escape(letters)}]"
    alone = rf"(?<![\w'])({one})(?![\w'])"
    text = text.replace("*", "").replace("\\text", "").replace("{", "(").replace("}", ")")
    conclusion = _conclusion(text)
    if conclusion is not None:
        found = re.search(alone, conclusion)
        return found[1] if found else None
    patterns = (
        rf"(?i:\b(?:option|choice)) \(?({one})\b",
        rf"\(({one})\)",
        rf"(?<!\w)({one})\)",
        rf"(?m)^\s*({one})(?:[.:]|\s*$)",
        rf"(?!A (?!is\b)[a-z]){alone}",
    )
    return next((found[1] for pattern in patterns if (found := re.search(pattern, text))), None)


def numbers_equal(first: Fraction, second: Fraction) -> bool:
    """Compare two numbers with a tolerance of 0.001, as LLM-Adapters' evaluation does.

    Its datasets contain rounded floats, such as ``0.6666666666666666`` for 2/3. ``0.667`` is equal to 2/3,
    and ``0.67`` is not. Different integers are never equal. Source: ``evaluate.py`` of LLM-Adapters,
    ``miss = 0.001``.
    """
    return abs(first - second) <= TOLERANCE


def _in_expression(conclusion: str, number: re.Match[str]) -> bool:
    """Whether the first number of a conclusion is part of an expression in variables."""
    sign = len(number[0]) - len(number[0].lstrip("+-"))  # may be the operator of a sum
    start = number.start() + sign
    before = conclusion[max(0, start - 20) : start]  # enough for an operand, and no more to search
    return bool(_EXPRESSION_BEFORE.search(before) or _EXPRESSION_AFTER.match(conclusion, number.end()))


def _conclusion(text: str) -> str | None:
    """The first non-empty line after the marker of highest precedence; None if the text has no marker."""
    for marker, occurrence in _MARKERS:
        ends = [found.end() for found in marker.finditer(text)]
        if ends:
            return next((_strip(line) for line in text[ends[occurrence] :].splitlines() if line.strip()), "")
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    """The value of a match of ``_NUMBER``; None for a division by zero, ``1 3/2``, or thousands of digits."""
    try:
        if found["ratio"]:
            numerator, denominator = (
                Fraction(part.replace(",", "")) for part in found["ratio"].replace(" ", "").split("/")
            )
            value = numerator / denominator
            if found["mixed"]:
                if value >= 1:
                    return None
                value += int(found["mixed"])
        else:
            exponent = int(found["e"] or found["ten"] or 0)
            value = Fraction(found["decimal"].replace(",", "")) * Fraction(10) ** exponent
    except (ValueError, ZeroDivisionError):
        return None
    return -value if "-" in (found["sign"], found["inner_sign"]) else value


def _strip(text: str) -> str:
    """``" **- 5"`` -> ``"-5"``: remove white space, emphasis, and the space after a sign."""
    return re.sub(r"^([-+]) +", r"\1", text.strip().strip("*= ").strip())


def _normalize(text: str) -> str:
    r"""Reduce LaTeX and Unicode to ASCII: ``1\tfrac{1}{2}`` -> ``1 1/2``, ``\$1,\!000`` -> ``$1,000``."""
    text = re.sub(r"[−–‐‑﹣－]", "-", text).replace("⁄", "/").replace("\u00a0", " ").replace("\u202f", " ")
    text = re.sub(r"\\[!,;: ]|\{(?=,\})|(?<=\{,)\}", "", text).replace("{,", ",")
    text = re.sub(r"\\([$%])", r"\1", text)
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r" \1", text)
    part = r"\s*(?:\{\s*(-?[0-9.,]+)\s*\}|([0-9]))"
    text = re.sub(rf"(?:([0-9])\s*)?\\[dtc]?frac{part}{part}", _latex_fraction, text)
    text = re.sub(r"([0-9])?([¼-¾⅐-⅞])", _unicode_fraction, text)
    return re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text))


def _latex_fraction(found: re.Match[str]) -> str:
    integer, *parts = found.groups()
    numerator, denominator = (part for part in parts if part is not None)
    return f"{integer} {numerator}/{denominator}" if integer else f"{numerator}/{denominator}"


def _unicode_fraction(found: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", found[2]).replace("⁄", "/")
    return f"{found[1]} {fraction}" if found[1] else fraction
