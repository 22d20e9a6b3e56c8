"""Final numbers and option letters: texts with expected values, and published evaluations as reference."""

import doctest
import re
from fractions import Fraction

import pytest

from gatera_lightning.datamodules.answers import numbers
from gatera_lightning.datamodules.answers.numbers import (
    find_final_number,
    find_option_letter,
    numbers_equal,
    parse_number,
)

# Expected value (None: no number) -> texts.
# fmt: off
NUMBERS = {
    "72": [
        "72", " 72 ", "72.", "72.0", "72.00", "+72", "072", "72!", "72 clips.", "72 clips", "72clips", "$72",
        "$ 72", "72 $", r"\$72", "$72$", r"$\boxed{72}$", "**72**", "= 72", "72%", "72 %", r"72\%",
        "72 percent", "72 dollars.", "€72", "£72", "72°", r"72^\circ", r"72^{\circ}", r"72\text{ cm}",
        r"72\text{ cm}^2", "72 cm²", "72 km/h", "72/hour", "$72 per hour", "72\xa0cm", r"72\mathrm{cm}",
        "72 square feet", "72 of them", "72\n", "7.2e1", "7.2E+1", "720e-1", "72 sq. ft.", "0.72 x 10^2",
        "144/2", r"\frac{144}{2}", "72/1", "72 / 1", "¥72", "72 people's", "72 half-days",
    ],
    "-2": [
        "-2", "- 2", "-2.", "-2.0", "−2", "–2", "‑2", "－2", "-$2", "$-2", "-$2.00", r"-\$2", "-2 degrees",
        "−2°", r"-2^\circ", "-4/2", r"-\frac{4}{2}", r"\frac{-4}{2}", "-2e0", "-2%", "−$2", "﹣2",
    ],
    "1000": [
        "1,000", "$1,000", "1,000.", "1,000.00", "1000", "1{,}000", r"1,\!000", r"\$1,\!000", "1e3", "1E3",
        "1,000 people", "1.0e+3", r"1 \times 10^{3}", "1 × 10^3", "10 * 10^2", r"10 \cdot 10^2", "2,000/2",
        "+1,000",
    ],
    "1000000": ["1,000,000", "1000000", "1e6", "$1,000,000.00", "1,000,000 bricks"],
    "7/2": [
        "3.5", "3.50", "$3.50", "7/2", "3 1/2", "3½", r"3\frac{1}{2}", r"\frac{7}{2}", r"\dfrac{7}{2}",
        r"\tfrac72", "$3.50 each", "3.5 hours", "3.5e0", "3 1/2 cups", r"3\dfrac12", "€3.50", "£3.50",
        "0.35e1", "3.5%", "7 / 2", "7⁄2",
    ],
    "3/4": [
        "3/4", "0.75", ".75", "¾", r"\frac{3}{4}", r"\frac34", "3/4 of the cake", "75e-2", "6/8", "$.75",
        "$3/4$", "3/4.", "0.75 m²", "1.5/2", r"\frac{1.5}{2}", r"\cfrac{3}{4}", r"\boxed{\frac{3}{4}}",
        "3/4 cups",
    ],
    "-3/4": ["-3/4", "-¾", "−3/4", r"-\frac{3}{4}", r"-\frac34", "-0.75", "-.75"],
    "-3/2": ["-1 1/2", "-1½", r"-1\frac{1}{2}"],
    "100/3": ["33 1/3%", "100/3", "33⅓"],
    "0": ["0", "0.0", "-0", "0/5", "$0", "0 apples", "000"],
    None: [
        "", " ", "\n", ".", "-", "$", "%", ",", "/", "x", "none", "twelve", "the answer", "B", "ab",
        "I don't know", "N/A", "?", "3 or 4", "3, 4", "(3, 4)", "3 and 4", "3-4", "3 to 4", "3:30", "3 4",
        "1 000", "3 + 4", "3 = 3", "12 apples and 3", "3;4", "2x", "2 x", "x = 2", "x2", "2y + 1",
        r"2\sqrt{3}", r"\sqrt{3}", "2√3", r"2\pi", "2π", "2^3", "x^2", r"\frac{x}{2}", "5xy", "1/0", "0/0",
        r"\frac{1}{0}", "1 3/2", "1 2/2", "1/2/2020", "3/4/5", "1,00", "12,34", "1,0000", "1,00,000",
        "1,2,3", "3.5.2", "1_000", "3 million", "3 thousand", "2 dozen", "$1 billion", "4 hundred", "5 m",
        "5 g", "1e", "9e99999", "7２", "٣", "七", "inf", "nan", "--2", "+-2", "2-", "(2)", "[2]", "<2", "≈2",
        "Rs. 50", "about 50", "#2", "2 (clips)", "2, I think", "1e3e3", "0x10",
    ],
}

# Expected value -> texts that may follow "The answer is:".
CONCLUSIONS = {
    "72": [
        "72", "72.", " 72", "72 clips.", "$72", r"\$72", "72.0", "72%", r"$\boxed{72}$", "**72**", "072",
        "+72", "\n72", "\n\n 72", "72\nSo 5 are left.", "72 because 24 * 3 = 72", "72, not 71", "72 or 71",
        "72 = 24 * 3", "x = 72", "about 72", "Rs. 72", "(72)", "exactly 72 clips", "72 (48 + 24)", "72!",
        "72°", "72 cm^2", "72\r\n5", "144/2", r"\frac{144}{2}", "72kg", "7.2e1", "72 million",
        "72\n\nQuestion: Tom has 5 cars", "72</s>", "72.\n\n### Instruction:\nWhat is 3?", "72-71", "72:00",
        "[72]",
    ],
    "-2": ["-2", "−2", "- 2", "-$2", "$-2", "-2.", "-2 degrees", "x = -2", "minus is -2", "–2"],
    "1000": ["1,000", "$1,000.", "1000", r"1,\!000", "1,000 bricks, as 500 + 500", "1e3"],
    "7/2": ["3.5", "$3.50", "7/2", "3 1/2", "3½", r"3\frac12", "3.50 dollars"],
    "3/4": ["3/4", ".75", r"\frac{3}{4}", "3 / 4", "0.75 of it", r"\dfrac{3}{4}"],
    "0": ["0", "$0", "0.0", "-0"],
    "3": ["3 or 4", "3, 4", "(3, 4)", "3 and 4 together", "3-4", "3:30", "3+4"],
    None: [
        "", " ", "\n", ".", "unknown", "none of them", "x", "B", "twelve", r"2\sqrt{3}", "2x", r"2\pi",
        "2^3", r"\sqrt{3}", "x^2", "unknown\nTom has 5", "...\n5", "n/a\n\nQuestion: 5", r"\frac{x}{2}",
        "five", "$", "?", "CO2", "9e99999", "2n + 1", "x_1", "n^2+1", "n^2 + 1", "x + 5", "n-3", "x^2 - 4",
        "a*5", r"\sqrt{3} + 2", r"\frac{x}{2} + 5", "π + 2", r"$x+1$", "f(x) - 2", "(n + 1)^2 + 5", "5 + x",
        "5 - n", "3 * y", "1/x", "2(x + 1)", r"5 + \sqrt{2}", r"3 \cdot x", "y = x + 3", "−x + 4", "k - 12",
        "2*pi", "sqrt(3) + 2", "f(3)", "5a + 3b", "3k-1", "2 * sqrt(5)", "(n+1)/2", "2 - a*b", "log(5)",
    ],
    "5": ["5 \\", "H2O has 5", "5/hour", "5 x 3", "5x3", "a 5", "5 - a dozen", "5 - I think", "total - 5",
        "5/h", "n = 5", "5 = n", "5 - 3", "5 (n apples)", "n: 5", "5m/s", "5m - that is it",
        "5 - pie"],
}

# Expected value -> texts without a marker, whose last number is the answer.
LAST_NUMBERS = {
    "72": [
        "72", "So 72.", "48 + 24 = 72", "It is 72 clips.", "72 clips are sold", "He sold $72", "Total: 72%",
        "48, 24, 72", "24\n72\n", "first 48, then -24, then 72", "48 + 24 equals 72!", "answer: 72",
        "Answer: 72 clips", "= 72", "=72", "(72)", "[72]", "72)", "no 5, but 72 it is",
        "He has 72. They are blue.", "**72**", r"\boxed{72}", "$72$", "72.", "72..", "72?", "'72'", "100-72",
        "3:72", "They have 1,000 and 72", "x=72", "72kg", "1 or 72", "1/2 and 72", "1e3, 72", "9 to 72",
        "7 x 72", "144/2", "7.2e1",
    ],
    "-2": ["-2", "10 - 12 = -2", "it falls to −2 degrees", "so -2.", "to -$2", "x=-2", "(-2)", "is –2"],
    "24": ["48-24", "48–24", "48 -> 24", "x-24", "48%-24", "(48)-24"],
    "1000": [
        "1,000", "in all $1,000", "it makes 500 + 500 = 1,000 bricks", "1000.00", "is 1,000.", "1e3",
        r"1,\!000",
    ],
    "7/2": [
        "3.5", "pays $3.50", "which is 3 1/2", "so 7/2 cups", "or 3½", r"3\frac{1}{2}", "it costs $3.50.",
    ],
    "3/4": ["3/4", "ate 3 / 4", ".75", "left: 0.75", r"or \frac{3}{4} of it", "2 2, 3/4"],
    "0": ["0", "none, 0", "5 - 5 = 0"],
    "2020": ["on 1/2/2020", "May 4, 2020", "in 2020"],
    None: [
        "", " ", "\n", "none", "twelve", "x", "I do not know.", "B", "...", "CO2", r"\sqrt{2}", "x^2", "2x",
        r"3\pi", "4^2", "H2O", "#", "-", "$", "%", "the answer", "٣", "７", "x2", "a_1", r"\frac{a}{2}",
        "2√5", "4 √",
    ],
}

# Expected letter -> texts.
LETTERS = {
    "A": [
        "A", "(A)", "A)", "A.", "A:", " A\n", "A) 23.65", "(A) 23.65", "The answer is A",
        "The answer is (A).", "it is A", "A, not B", "Option A", "#### A", "the answer is: A", "**A**",
        "A is right", "option A is right", "(A) and (B)", "Answer: A",
    ],
    "B": [
        "B", "(B)", "B)", "B.", "B:", "B is right", "b) or B)", "The answer is B.", "The answer is: (B)",
        "The answer is:\nB", "#### B", "####B", "#### (B)", "(A) is wrong. The answer is B",
        "The answer is A. No, the answer is B.", "A train needs B", "so: B", "'(B)",
        "The answer is: B\n\nQuestion: A man", "The answer is: B) 27 m", "the ANSWER IS B",
        "We choose option B.", "Choice B", "choice (B)", "A) no, but option B", r"\text{(B)}",
        r"The answer is $\text{B}$", r"\boxed{B}", "The answer is **B**", "I think\nB. 27", "[B]", "B;C",
    ],
    "C": [
        "C", "\n\nC\n", "(C) or (D)", "D, as (C) says", "The correct answer is C", "The final answer is C!",
        "Option C, not option D", "C)", "#### C\n#### D", "#### C\nThe answer is D",
        "Rationale: 5 + 5 = 10.The answer is (C).", "C) D)", "it must be C", "C/D", "C=5",
    ],
    "D": [
        "D", "(D)", "the answer is D because A is not", "The answer is (A).\nThe answer is: (D).",
        "Answer:\nD", "D - 28", "D\nE", "answer is: D or E", "answer  is  D", "#### the letter D",
        "Question (D)",
    ],
    "E": [
        "E", "(E)", "E: 29", "The answer is E", "The answer is none, that is E", "hence E.", "e) E)",
        "E\tnone", "The answer is: option E",
    ],
    None: [
        "", " ", "\n", "a", "b", "(b)", "F", "(F)", "23.65", "The answer is 23.65.", "The answer is",
        "The answer is:", "####", "#### 5", "AB", "ABCDE", "A train goes", "A man has 5 cows.",
        "ABC is a triangle", "A's", "the letter", "None", "Abe", "CD", "B2", "2B", "B_1",
        "(A) or (B)? The answer is 23.65.", "The answer is 5.\nB", "The answer is: b", "The answer is F",
        "The answer is AB", "I, myself", "(A1)", "Don't", "DNA", "𝐀", "Ａ", "а", "option 2", "options", "É",
        "A few of them",
    ],
}
# fmt: on

SOLUTION = "He sold 48 in April and 48 / 2 = 24 in May, which the 9 buyers liked.\n"


def pairs(table):
    """``(text, expected)`` of every text in a table."""
    return [(text, expected) for expected, texts in table.items() for text in texts]


def final_value(text):
    found = find_final_number(text)
    return None if found is None else parse_number(found)


def fraction(text):
    return None if text is None else Fraction(text)


@pytest.mark.parametrize("table", [NUMBERS, CONCLUSIONS, LAST_NUMBERS, LETTERS])
def test_tables_are_large_and_without_duplicates(table):
    texts = [text for text, _ in pairs(table)]
    assert len(texts) == len(set(texts)) >= 60
    assert len(table[None]) >= 25


def test_parse_number():
    for text, expected in pairs(NUMBERS):
        assert (text, parse_number(text)) == (text, fraction(expected))


METAMATH = ["The answer is: ", "The answer is:", "the answer is: ", "So the final answer is : "]
GSM8K = ["#### ", "####", "\n#### ", "####  "]
LLM_ADAPTERS = ["The answer is ", "Thus, the answer  is ", "THE ANSWER IS\n"]


@pytest.mark.parametrize(
    ("before", "marker"),
    [
        *(
            (before, marker)
            for marker in METAMATH
            for before in (
                "",
                SOLUTION,
                f"{SOLUTION}#### 11\n",
                "The answer is: 11.\n",
                "The answer is 11.\n",
            )
        ),
        *(
            (before, marker)
            for marker in GSM8K
            for before in ("", SOLUTION, "To see what the answer is, we add 3 and 4.\n")
        ),
        *((before, marker) for marker in LLM_ADAPTERS for before in ("", SOLUTION, "The answer is 11.\n")),
    ],
)
def test_find_final_number_after_marker(before, marker):
    for text, expected in pairs(CONCLUSIONS):
        assert (text, final_value(f"{before}{marker}{text}")) == (text, fraction(expected))


def test_find_final_number_without_marker():
    for text, expected in pairs(LAST_NUMBERS):
        assert (text, final_value(text)) == (text, fraction(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 5\n#### 6", "5"),  # the search in GSM8K's code takes the first
        ("#### 5\nThe answer is: 6", "6"),
        ("The answer is: 6\n#### 5", "6"),
        ("The answer is 6\n#### 5", "5"),
        ("The answer is: 5. The answer is: 6", "6"),
        ("The answer is: 5\nThe answer is 6", "5"),
        ("The answer is 5. The answer is 6.", "6"),
        ("The answer is: 5. The answer is: ", None),
        ("#### \n", None),
        ("The answer is:\n\n\n 1,234 dollars", "1,234"),
        ("answers is 5 of 6", "6"),
        ("The answer was 5 of 6", "6"),
        ("### 5 of 6", "6"),
        # The number is written as in the normalized text:
        (r"#### 1\frac{1}{2} cups", "1 1/2"),
        ("#### -$1,000.50.", "-$1,000.50"),
        ("#### ½", "1/2"),
    ],
)
def test_find_final_number_orders_markers(text, expected):
    assert find_final_number(text) == expected


def test_find_option_letter():
    for text, expected in pairs(LETTERS):
        assert (text, find_option_letter(text)) == (text, expected)


def test_find_option_letter_accepts_other_letters():
    assert find_option_letter("(F)", "FG") == find_option_letter("The answer is F", "ABCDEF") == "F"
    assert find_option_letter("The answer is E", "ABC") is None
    assert find_option_letter("The answer is ].", "]^") == "]"  # not interpreted as a pattern


def published_metamath(text):
    """``eval_gsm8k.py`` of MetaMath, without its rounding and fractions."""
    parts = text.split("The answer is: ")
    found = re.search(r"[\-+]?\d*[\.,/]?\d+", parts[-1].strip()) if len(parts) > 1 else None
    return float(found[0].replace(",", "")) if found else None


def published_gsm8k(text):
    """``dataset.py`` of GSM8K."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return float(found[1].rstrip(".").replace(",", "")) if found else None


def published_llm_adapters(text):
    """``evaluate.py`` of LLM-Adapters."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else None


@pytest.mark.parametrize("answer", ["72", "-2", "3.5", "0.75", "1,000", "12,345", "0", "072", "72.0", "1.25"])
@pytest.mark.parametrize("after", ["", ".", " clips.", "\n", " of them, not 71"])
def test_plain_answers_are_parsed_as_published(answer, after):
    for text, published in (
        (f"{SOLUTION}The answer is: {answer}{after}", published_metamath),
        (f"{SOLUTION}#### {answer}{after}", published_gsm8k),
        (f"{SOLUTION}It is {answer}{after.partition(',')[0]}", published_llm_adapters),
    ):
        assert final_value(text) == Fraction(answer.replace(",", ""))
        assert float(final_value(text)) == published(text)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("72", "72.0", True),
        ("1/2", "0.5", True),
        ("2/3", "0.6666666666666666", True),
        ("11/6", "1.8333333333333335", True),  # not even the nearest float
        ("-2/3", "-0.6666666666666666", True),
        ("2/3", "0.67", False),
        ("2/3", "0.666667", True),
        ("2/3", "0.667", True),
        ("2/3", "0.66", False),
        ("11/6", "1.833", True),
        ("2.3", "2.301", True),  # exactly the tolerance
        ("2.3", "2.3011", False),
        ("-0.5", "-0.5009", True),
        ("2/3", "-0.6666666666666666", False),
        ("1", "0.9999999999999999", True),
        ("1", "0.99999999", True),
        ("1000000000000000", "1000000000000001", False),  # integers are compared exactly
        ("72", "73", False),
        ("2", "-2", False),
        ("0", "0.0000000000000001", True),
        ("0", "-0", True),
        ("1000000", "1000000.0001", True),
    ],
)
def test_numbers_equal(first, second, equal):
    assert numbers_equal(Fraction(first), Fraction(second)) is equal
    assert numbers_equal(Fraction(second), Fraction(first)) is equal


@pytest.mark.parametrize("gold", ["0.6666666666666666", "4.333333333333333", "0.4166666666666667", "9.8"])
@pytest.mark.parametrize("answer", ["{:.2f}", "{:.3f}", "{:.4f}", "{:.1f}"])
def test_rounded_answers_are_judged_as_in_llm_adapters(gold, answer):
    """``evaluate.py``: abs(label - predict) <= 0.001."""
    text = answer.format(float(gold))
    published = abs(float(gold) - published_llm_adapters(text)) <= 0.001
    assert numbers_equal(Fraction(gold), final_value(f"It is {text}")) is published


def test_repetitive_text_is_parsed_quickly():
    """A model may repeat itself up to the length limit; the regular expressions must not backtrack."""
    assert parse_number("9" * 5_000) is None  # Python does not convert that many digits
    assert parse_number("1e999") == Fraction(10) ** 999
    assert parse_number("1e1000") is None
    parts = [
        "9",
        "1,000",
        "1,",
        "1/",
        "1 ",
        "-",
        ".",
        "$",
        "#### ",
        "The answer is ",
        "\\frac{1}",
        "{",
        " ",
        "(A",
        "(n",
        "n + ",
        "1 + n ",
        "1(n+",
    ]
    for part in [*parts, "1 1/1 ", "^", "½"]:
        text = part * 5_000
        found = find_final_number(text)
        assert found is None or parse_number(found) is None or len(found) < 20 or part == "9"
        assert parse_number(text) is None or part == "$"
        assert find_option_letter(text) in (None, "A")


def test_doctests():
    assert doctest.testmod(numbers) == (0, 1)
