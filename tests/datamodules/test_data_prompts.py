"""Prompt templates: the exact text a model reads."""

from typing import get_args

import pytest

from gatera_lightning.datamodules.prompts import Template, render

ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Where is milk kept?

### Response:
"""


def test_alpaca_is_the_published_text():
    assert render("alpaca", "Where is milk kept?", "fridge") == (ALPACA, "fridge")


def test_plain_leaves_the_space_to_the_answer():
    assert render("plain", "Where is milk kept?", "fridge") == ("Question: Where is milk kept?\nAnswer:", " fridge")


@pytest.mark.parametrize("template", get_args(Template))
def test_no_prompt_ends_in_a_space(template):
    prompt, answer = render(template, "Where?", "here")
    assert not prompt.endswith(" ")
    assert answer.strip() == "here"


@pytest.mark.parametrize("template", get_args(Template))
def test_braces_in_a_request_are_text(template):
    assert "what is {request} in {0} or {}?" in render(template, "what is {request} in {0} or {}?", "a {b}")[0]


def test_unknown_template_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'vicuna'.*alpaca, plain"):
        render("vicuna", "Where?", "here")
