"""Options in generated text: texts with the expected option, and the published expressions as reference."""

import re

import pytest

from gatera_lightning.datamodules.answers.options import KEYWORDS, find_keyword, find_option
from gatera_lightning.datamodules.tasks.commonsense import TASKS

PUBLISHED = {  # what commonsense_evaluate.py of LLM-Adapters searches for in the stripped text
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": r"answer1|answer2|answer3|answer4|answer5",
    "ARC-Challenge": r"answer1|answer2|answer3|answer4|answer5",
    "ARC-Easy": r"answer1|answer2|answer3|answer4|answer5",
    "openbookqa": r"answer1|answer2|answer3|answer4|answer5",
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
}

# Index of the expected keyword (None: no answer) -> texts.
# fmt: off
BOOLQ = {
    0: [
        "true", "the correct answer is true", "true.", " true ", "\ntrue\n", "\ttrue", "true\r\n", "true!",
        "(true)", "'true'", "true or false", "true/false", "truefalse", "not true", "not true but false",
        "untrue", "trueness", "_true_", "xtruex", "truetrue", "It is true that false starts happen",
        "true\nfalse", "### Response:\ntrue", "True? true, not false", "0true1", "True, true", "TRUE\ntrue",
        "the correct answer is true the correct answer is false", "fals true", "f alse; true", "**true**",
        "true\xa0", "\u3000true", "是true的",
        "答案:true。false", "construed",
    ],
    1: [
        "false", "the correct answer is false", "false.", "  false", "\n\nfalse", "false!", "<false>",
        "false or true", "falsetrue", "not false", "false, not true", "falsehood", "FALSE false",
        "True or false", "the answer: false;true", "tru false", "false\ntrue", "t rue false", "falsetto",
        "no (false)", "\x00false", "ｔｒｕｅ false", "trfalseue",
    ],
    None: [
        "", " ", "\n", "True", "FALSE", "TRUE", "False.", "tRUE", "t r u e", "tru", "fals", "yes", "no",
        "answer1", "solution2", "the correct answer is", "option1 ending2", "ｔｒｕｅ", "trüe", "fаlse",
        "tr-ue", "tr\nue", "fal se", "1", "the truth", "falze",
    ],
}

PIQA = {
    0: [
        "solution1", "the correct answer is solution1", "solution1.", " solution1 ", "\nsolution1\n",
        "solution1!", "(solution1)", "solution1 or solution2", "solution1/solution2", "solution1solution2",
        "not solution1 but solution2", "solution12", "solution10", "solution1a", "resolution1",
        "my_solution1", "Solution2, no: solution1", "SOLUTION2 solution1", "solution1\x00",
        "solution3, solution1", "solution 2 or solution1",
        "solution1solution1solution1solution1solution1solution1solution1solution1solution1",
        "solution1\nsolution2", "solution\nsolution1", "是solution1的",
        "### Response:\nthe correct answer is solution1\n\n### Instruction:\nsolution2",
        "solution0 solution1", "solution-2 solution1", "answer2 solution1", "**solution1**",
        "solution1\u3000", "solution² solution1", "solution1.5",
    ],
    1: [
        "solution2", "the correct answer is solution2", "solution2.", "  solution2", "\t\nsolution2",
        "solution2?", "[solution2]", "solution2 or solution1", "solution2solution1", "not solution2",
        "solution21", "solution22", "solution20", "solutionsolution2", "solution 1 or solution2",
        "Solution1 solution2", "solution3 solution2", "solution\xa01 solution2", "solution１ solution2",
        "solution2\nsolution1", "solution#1: solution2", "option1; solution2", "dissolution2",
        "solution02 solution2",
    ],
    None: [
        "", " ", "\n\n", "Solution1", "SOLUTION2", "solution 1", "solution", "solution3", "solution0",
        "solution-1", "solution\n2", "1", "2", "answer1", "true", "option2", "solution１", "solution²",
        "sоlution1", "solution_2", "soluti on1", "solution.1", "the correct answer is", "the first one",
        "solution\u200b1", "solutionone", "solution01", "solution\t2", "ending1",
    ],
}

ANSWERS = {
    0: [
        "answer1", "the correct answer is answer1", "answer1.", " answer1 ", "\nanswer1\n", "(answer1)",
        "answer1, answer2, answer3", "not answer1 but answer2", "answer12", "answer10", "answer1answer5",
        "answer1/answer2", "myanswer1", "Answer2 answer1", "answer 3 answer1", "answer6 answer1",
        "answer1\nanswer4", "是answer1的", "answer1answer1answer1answer1answer1answer1answer1answer1answer1",
        "answer0answer1", "ANSWER5: answer1",
    ],
    1: [
        "answer2", "the correct answer is answer2", "answer2!", "\t answer2", "answer2 or answer1",
        "answer21", "answer2.answer3", "answer 1? answer2", "Answer1, no, answer2", "answer\n1 answer2",
        "answeranswer2", "\u3000answer2\u3000", "answer１ answer2",
    ],
    2: [
        "answer3", "the correct answer is answer3", "'answer3'", "answer3answer2", "neither; answer3",
        "answer35", "answer9 answer3", "the correct answer is answer3\n\n### Instruction:\nanswer1",
        "_answer3_", "answer3?answer1", "answer-1 answer3",
    ],
    3: [
        "answer4", "the correct answer is answer4", "answer4;", "answer44",
        "answer4 answer3 answer2 answer1", "x\n\n\nanswer4", "option1 answer4", "solution2, answer4",
        "answer04 answer4", "true answer4", "answer4\r\nanswer1",
    ],
    4: [
        "answer5", "the correct answer is answer5", "answer5.", "answer5 or answer2", "answer51",
        "Answer1 answer5", "answer7answer5",
    ],
    None: [
        "", " ", "\n", "Answer1", "ANSWER2", "answer 1", "answer", "answer6", "answer0", "answer9",
        "answer-1", "answer\n1", "1", "A", "the correct answer is", "the correct answer is 3", "answer１",
        "аnswer1", "answer²", "answer_1", "answer#2", "answerone", "option1", "solution1", "ending1", "true",
        "answer01", "a n s w e r 1", "answer\u200b1", "answer.3", "answers 1",
    ],
}

HELLASWAG = {
    0: [
        "ending1", "the correct answer is ending1", "ending1.", " ending1 ", "\nending1", "(ending1)",
        "ending1 or ending4", "not ending1 but ending3", "ending12", "ending1ending2", "spending1",
        "Ending2 ending1", "ending5 ending1",
        "ending1ending1ending1ending1ending1ending1ending1ending1ending1", "bending1", "ending 4 ending1",
        "ending1\nending2", "是ending1的", "ending1/ending2/ending3/ending4", "ending10",
    ],
    1: [
        "ending2", "the correct answer is ending2", "ending2!", "\t\tending2", "ending2 ending1", "ending21",
        "ending 1, ending2", "answer1 ending2", "ENDING1 ending2", "ending0 ending2", "endingending2",
        "ending2\u3000ending3", "ending\n1ending2",
    ],
    2: [
        "ending3", "the correct answer is ending3", "ending3?", "**ending3**", "ending3ending1", "ending34",
        "ending9, ending3", "the correct answer is ending3\n\n### Instruction:\nending1", "not ending3",
        "Ending 1: ending3", "option2 ending3",
    ],
    3: [
        "ending4", "the correct answer is ending4", "ending4;", "ending44", "ending4 ending3", "x\nending4",
        "ending5ending4", "true ending4", "ending\xa01 ending4", "ending１ ending4", "Ending4 ending4",
    ],
    None: [
        "", " ", "\n", "Ending1", "ENDING4", "ending 1", "ending", "ending5", "ending0", "ending6",
        "ending-1", "ending\n3", "4", "the correct answer is", "the happy ending", "ending１", "еnding1",
        "ending²", "ending_1", "endingone", "end ing1", "answer1", "solution1", "option1", "false",
        "ending01", "ending\u200b1", "ending.2", "endings 1",
    ],
}

WINOGRANDE = {
    0: [
        "option1", "the correct answer is option1", "option1.", " option1 ", "\noption1\n", "option1!",
        "(option1)", "'option1'", "option1 or option2", "option1/option2", "option1option2",
        "not option1 but option2", "option12", "option10", "option1a", "adoption1", "my_option1",
        "Option2, no: option1", "OPTION2 option1", "option3, option1", "option 2 or option1",
        "option1option1option1option1option1option1option1option1option1", "option1\noption2",
        "option\noption1", "是option1的", "option0 option1", "answer2 option1", "option1\u3000",
        "option² option1", "the correct answer is option1\n\n### Instruction:\noption2", "**option1**",
        "option-2 option1",
    ],
    1: [
        "option2", "the correct answer is option2", "option2.", "  option2", "\t\noption2", "option2?",
        "[option2]", "option2 or option1", "option2option1", "not option2", "option21", "option22",
        "option20", "optionoption2", "option 1 or option2", "Option1 option2", "option3 option2",
        "option\xa01 option2", "option１ option2", "option2\noption1", "option#1: option2", "true; option2",
    ],
    None: [
        "", " ", "\n\n", "Option1", "OPTION2", "option 1", "option", "option3", "option0", "option-1",
        "option\n2", "1", "2", "answer1", "solution1", "ending2", "false", "option１", "option²", "оption1",
        "option_2", "opti on1", "option.1", "options 1", "the correct answer is", "the first one",
        "option\u200b1", "optionone", "option01", "option\t2", "option4", "option5",
    ],
}
# fmt: on

TABLES = {"boolq": BOOLQ, "piqa": PIQA, "ARC-Easy": ANSWERS, "hellaswag": HELLASWAG, "winogrande": WINOGRANDE}
ALL_TEXTS = [text for table in TABLES.values() for texts in table.values() for text in texts]


def published_keyword(task, text):
    """The keyword that LLM-Adapters compares with the correct answer; empty if there is none."""
    return (re.findall(PUBLISHED[task], text.strip()) or [""])[0]


def test_keywords_are_the_published_ones():
    assert {task: "|".join(keywords) for task, keywords in KEYWORDS.items()} == PUBLISHED
    assert set(TASKS) == {*KEYWORDS, "everyday"}


@pytest.mark.parametrize("task", TABLES)
def test_tables_are_large_and_without_duplicates(task):
    texts = [text for texts in TABLES[task].values() for text in texts]
    assert len(texts) == len(set(texts)) >= 60


@pytest.mark.parametrize("task", TABLES)
def test_find_keyword(task):
    keywords = PUBLISHED[task].split("|")
    for index, texts in TABLES[task].items():
        for text in texts:
            assert (text, find_keyword(text, keywords)) == (text, index)
            assert (text, published_keyword(task, text)) == (text, "" if index is None else keywords[index])


@pytest.mark.parametrize("task", PUBLISHED)
def test_find_keyword_judges_as_published_for_any_labels(task):
    """Labels may be fewer than the keywords, and in another order."""
    keywords = PUBLISHED[task].split("|")
    for labels in (keywords, keywords[::-1], keywords[:2], keywords[1:]):
        for text in ALL_TEXTS:
            keyword = published_keyword(task, text)
            expected = labels.index(keyword) if keyword in labels else None
            assert (text, find_keyword(text, labels)) == (text, expected)


@pytest.mark.parametrize("options", [3, 4])
def test_keyword_that_is_not_an_option_is_wrong(options):
    labels = tuple(f"answer{n}" for n in range(1, options + 1))
    assert find_keyword("the correct answer is answer5", labels) is None
    assert find_keyword("answer5, or rather answer2", labels) is None
    assert find_keyword("answer2, or rather answer5", labels) == 1


CHOICES = tuple(f"choice{n}" for n in range(1, 13))


@pytest.mark.parametrize(
    ("text", "labels", "index"),
    [
        ("the correct answer is choice2", ("choice1", "choice2"), 1),
        ("choice3, or rather choice1", ("choice1", "choice2"), 0),  # choice3 is not a published keyword
        ("choice10", CHOICES, 9),
        ("choice12 choice1", CHOICES, 11),
        ("choice1 choice12", CHOICES, 0),
        ("choice13", CHOICES, 0),
        ("choice1", CHOICES[::-1], 11),
        ("Choice2", CHOICES, None),
        ("choice 2", CHOICES, None),
        ("answer2", CHOICES, None),
        ("", CHOICES, None),
        ("yes", ("yes", "no"), 0),
        ("no, yes", ("yes", "no"), 1),
        ("No.", ("yes", "no"), None),
        ("not entailment", ("entailment", "not entailment"), 1),
        ("option3", ("option1", "option2", "option3"), 2),  # more options than in WinoGrande
        ("answer6", tuple(f"answer{n}" for n in range(1, 7)), 5),
        ("answer12", tuple(f"answer{n}" for n in range(1, 13)), 11),
        ("the answer is true", ("true", "false", "unknown"), 0),
        ("unknown, not true", ("true", "false", "unknown"), 2),
        ("answer2 true", ("true", "answer2"), 1),
        ("abc", ("a.c", "a+"), None),  # labels are not patterns
        ("1) a+ 2) a.c", ("a.c", "a+"), 1),
        ("(B)", ("(A)", "(B)"), 1),
        ("answer1", (), None),
    ],
)
def test_other_labels_are_their_own_keywords(text, labels, index):
    assert find_keyword(text, labels) == index


def test_find_keyword_rejects_empty_label():
    with pytest.raises(ValueError, match=r"labels: \['yes', ''\] contains an empty one"):
        find_keyword("anything", ["yes", ""])


MILK = ("in the fridge", "In the shed.", "on the  roof", "on Mt. Everest", "STRASSE")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("in the fridge", 0),
        (" in the fridge", 0),
        ("In The FRIDGE", 0),
        ("in the fridge.", 0),
        ("in the fridge .", 0),
        ("in  the\tfridge \r\n", 0),
        ("\n \n\nin the fridge\nin the shed", 0),
        ("in the shed", 1),
        ("in the shed.\n\nQuestion: Where is hay kept?", 1),
        ("on the roof", 2),
        ("on the\u00a0roof", 2),
        ("on mt. everest.", 3),
        ("on mt everest", None),  # only a final period is ignored
        ("straße", 4),
        ("", None),
        (" \n\t\n", None),
        (".", None),
        ("in the", None),
        ("it is in the fridge", None),
        ("in the fridge or in the shed", None),
        ("in the fridge, in the shed", None),
        ("in the fridge..", None),
        ("in the fridge!", None),
        ("inthefridge", None),
        ("in the\nfridge", None),
        ("I think\nin the fridge", None),
        ("the correct answer is answer1", None),
    ],
)
def test_find_option(text, index):
    assert find_option(text, MILK) == index


@pytest.mark.parametrize(
    ("options", "text", "index"),
    [
        (("milk", "Milk."), "milk", None),
        (("milk", "milk", "hay"), "milk", None),
        (("milk", "  MILK", "hay"), "hay", 2),
        (("milk", "milk and hay"), "milk", 0),
        (("milk", "milk and hay"), "milk and hay", 1),
        ((" milk", " hay"), "hay", 1),
        ((), "milk", None),
    ],
)
def test_find_option_rejects_ambiguous_match(options, text, index):
    assert find_option(text, options) == index
