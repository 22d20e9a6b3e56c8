r"""Reading the answer out of a worked solution: a number as exact fraction, or an option's letter.

Solutions end in ``The answer is: 72`` (MetaMath), in ``#### 72`` (GSM8K), or in a sentence. Everything here is text in,
text or :class:`~fractions.Fraction` out; what a number is called (``$3.50``, ``72 clips``, ``50%``) is not part of its value.
"""

import re
import unicodedata
from fractions import Fraction

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]+)?|(?<![0-9A-Za-z])\.[0-9]+)"
_RATIO = rf"{_DECIMAL} ?/ ?{_DECIMAL}"
_POWER = r"(?:[eE](?P<e>[-+]?[0-9]{1,3})(?![0-9])| ?(?:\\times|\\cdot|[×x*]) ?10\^\{?(?P<ten>[-+]?[0-9]{1,3})(?![0-9])\}?)"
_NUMBER = re.compile(
    r"(?<![\w{^\\√])(?P<sign>(?<![)\]}%])[-+])?(?:[$£€¥₹] ?)?(?P<inner_sign>(?<=[$£€¥₹])[-+])?"
    rf"(?:(?P<mixed>[0-9]+ )?(?P<ratio>{_RATIO})|(?P<decimal>{_DECIMAL})(?:{_POWER})?)"
)
_EXPRESSION = re.compile(  # follows a number that is part of something else
    r" ?(?:\\sqrt|√|\\pi|π|\^)|[xyzn](?![A-Za-z0-9])|[eE][-+]?[0-9]"
)
_UNIT = re.compile(  # two letters or more, since a lone one is a variable; a multiplier is not a unit
    r" ?[%$£€¥₹°]?(?: ?/?(?! ?(?:hundred|thousand|(?:m|b|tr)illion|dozen)|[abcxyz]{2,3}(?![A-Za-z])) ?"
    r"[A-Za-z][A-Za-z²³/](?:[A-Za-z²³/.' -]|\^\{?[23]\}?)*)?[ .!$*]*"
)
_MARKS = (  # where a conclusion begins, and which of several counts
    (re.compile(r"\banswer\s+is\s*:", re.IGNORECASE), -1),  # MetaMath
    (re.compile("####"), 0),  # GSM8K
    (re.compile(r"\banswer\s+is\b", re.IGNORECASE), -1),  # LLM-Adapters; prose may say it before ####
)


def number(text: str) -> Fraction | None:
    r"""The value of a text that is one number and, at most, what it counts; else None.

    Read are thousands' commas, decimals, ``3/4``, ``1 1/2``, ``½``, ``\frac{3}{4}``, ``1.5e3``, ``3 \times 10^{4}``, any minus
    sign, ``$``, ``\$`` and other currencies, a unit of two letters or more, ``**`` and ``\boxed``. ``50%`` is 50, not 1/2: the
    evaluations of MetaMath and GSM8K read the digits alone. None are two numbers, an expression (``2\sqrt{3}``, ``2x``,
    ``(3, 4)``), ``3 million`` and a number in words.

    >>> number("$1,234.50"), number("3/4 cups."), number("3 or 4")
    (Fraction(2469, 2), Fraction(3, 4), None)
    """
    found = _NUMBER.match(_stripped(_plain(text)))
    return None if found is None or not _UNIT.fullmatch(found.string[found.end() :]) else _value(found)


def final_answer(text: str) -> str | None:
    """The number, as written, that a solution ends in; None without one.

    In this order: the first number after the last ``The answer is:``, as MetaMath reads it; the first after the first
    ``####``, as GSM8K does; the first after the last ``The answer is``; the last number of all, as LLM-Adapters does. A mark
    holds for its line; where no number follows it, or an expression, there is no answer: an earlier number is not one.
    """
    text = _plain(text)
    conclusion = _conclusion(text)
    numbers = list(_NUMBER.finditer(text if conclusion is None else conclusion))
    if not numbers:
        return None
    found = numbers[-1 if conclusion is None else 0]
    return None if _EXPRESSION.match(found.string, found.end()) else found[0].strip()


def option_letter(text: str, letters: str = "ABCDE") -> str | None:
    """The option that a text chooses, one of ``letters`` in capitals; None when it chooses none.

    In this order: the first letter that stands alone on the line of a conclusion (``The answer is:``, ``####``,
    ``The answer is``), and no other; the first of ``option B`` or ``choice (B)``; of ``(B)``; of ``B)``; of ``B.``, ``B:`` or
    ``B`` at the beginning of a line; of a letter alone, save the article in ``A train``.
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


def same_number(first: Fraction, second: Fraction) -> bool:
    """Whether two numbers are equal: exactly, or as nearly as a float is to the fraction that it stands for.

    The sets of LLM-Adapters hold ``0.6666666666666666`` for 2/3 and ``1.8333333333333335`` for 11/6, so numbers that are not
    both whole may differ by 1e-12 of the larger. ``0.67`` is not 2/3.
    """
    if first == second or first.denominator == second.denominator == 1:
        return first == second
    return abs(first - second) <= Fraction(1, 10**12) * max(abs(first), abs(second))


def _conclusion(text: str) -> str | None:
    """The first line with text after the first of ``_MARKS`` that a text has; None without any."""
    for mark, which in _MARKS:
        ends = [found.end() for found in mark.finditer(text)]
        if ends:
            return next((_stripped(line) for line in text[ends[which] :].splitlines() if line.strip()), "")
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    """What a match of ``_NUMBER`` is worth; None for a division by zero, ``1 3/2``, and numbers of thousands of digits."""
    try:
        if found["ratio"]:
            above, below = (
                Fraction(part.replace(",", "")) for part in found["ratio"].replace(" ", "").split("/")
            )
            value = above / below
            if found["mixed"]:
                if value >= 1:
                    return None
                value += int(found["mixed"])
        else:
            value = Fraction(found["decimal"].replace(",", "")) * Fraction(10) ** int(
                found["e"] or found["ten"] or 0
            )
    except (ValueError, ZeroDivisionError):
        return None
    return -value if "-" in (found["sign"], found["inner_sign"]) else value


def _stripped(text: str) -> str:
    """``" **- 5"`` -> ``"-5"``: without white space, emphasis, and the space after a sign."""
    return re.sub(r"^([-+]) +", r"\1", text.strip().strip("*= ").strip())


def _plain(text: str) -> str:
    r"""One way of writing: ``1\tfrac{1}{2}`` and ``1½`` become ``1 1/2``, ``\$1,\!000`` becomes ``$1,000``, ``−`` a hyphen."""
    text = re.sub(r"[−–‐‑﹣－]", "-", text).replace("⁄", "/").replace("\u00a0", " ").replace("\u202f", " ")
    text = re.sub(r"\\[!,;: ]|\{(?=,\})|(?<=\{,)\}", "", text).replace("{,", ",")
    text = re.sub(r"\\([$%])", r"\1", text)
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r" \1", text)
    part = r"\s*(?:\{\s*(-?[0-9.,]+)\s*\}|([0-9]))"
    text = re.sub(rf"(?:([0-9])\s*)?\\[dtc]?frac{part}{part}", _ratio, text)
    text = re.sub(r"([0-9])?([¼-¾⅐-⅞])", lambda m: f"{m[1] or ''}{' ' if m[1] else ''}{_vulgar(m[2])}", text)
    return re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text))


def _ratio(found: re.Match[str]) -> str:
    whole, *parts = found.groups()
    above, below = (part for part in parts if part is not None)
    return f"{whole} {above}/{below}" if whole else f"{above}/{below}"


def _vulgar(sign: str) -> str:
    return unicodedata.normalize("NFKC", sign).replace("⁄", "/")
