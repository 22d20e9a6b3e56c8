"""Chat templates that fail, loop, or depend on anything else than their messages."""

import datetime
import logging
import random

import pytest

from gatera_lightning.datamodules.prompts.chat_template import render_chat
from gatera_lightning.datamodules.tokenization import chat_rendering
from gatera_lightning.datamodules.tokenization.chat_rendering import render_template
from gatera_lightning.errors import ConfigError

WHERE = [{"role": "user", "content": "Where?"}]
RECURSION = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
LOOP = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
)
REJECTS = "the tokenizer's chat template rejects these messages: "
FAILING = {
    "{{ raise_exception('roles must alternate') }}": REJECTS + "roles must alternate",
    "{{ messages[7].content.x }}": REJECTS + ".*has no element 7",
    "{{ messages[0].content + 5 }}": REJECTS + "TypeError: ",
    "{{ 1 / 0 }}": REJECTS + "ZeroDivisionError: division by zero",
    "{{ messages[0]['content'].nothing() }}": REJECTS + ".*has no attribute 'nothing'",
    "{% for m in messages %}": REJECTS + "Unexpected end of template",
    "{{ messages | nothing }}": REJECTS + "No filter named 'nothing'",
    "{% include 'x' %}": REJECTS + ".+",
    "{{ range(10**9) | list }}": REJECTS + "OverflowError: ",
    RECURSION: REJECTS + "RecursionError: maximum recursion depth exceeded",
    LOOP: "the tokenizer's chat template did not end within 0.2 seconds on these messages",
    "{{ 'x' * 20000000 }}": "the tokenizer's chat template writes 20,000,000 characters for these messages",
    "{{ ['a', 'b'] | random }}": r"the tokenizer's chat template depends on chance \(\| random\)",
    "{{ lipsum() }}": r"the tokenizer's chat template depends on chance \(lipsum\)",
}


@pytest.mark.parametrize("template", FAILING)
def test_failing_template_is_one_sentence(
    template, chat_tokenizers, make_instruction_data, write, monkeypatch
):
    monkeypatch.setattr(chat_rendering, "MAX_SECONDS", 0.2)
    tokenizer = chat_tokenizers["gemma"]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    path = write("rows.json", [{"instruction": "Where?", "output": "Here."}])
    data = make_instruction_data(template="chat", tokenizer=tokenizer, train=[path])
    with pytest.raises(ConfigError, match=rf"rows\.json, row 1: {FAILING[template]}") as caught:
        list(data.examples("train"))
    assert "\n" not in str(caught.value)


def test_time_is_not_bounded_by_a_handler_that_stays(chat_tokenizers):
    import signal

    before = signal.getsignal(signal.SIGVTALRM)
    render_template(chat_tokenizers["gemma"], WHERE)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


class Clock(datetime.datetime):
    """A clock that shows another time whenever somebody looks."""

    @classmethod
    def now(cls, tz=None):
        return cls(random.randrange(1971, 2100), random.randrange(1, 13), random.randrange(1, 29))


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        ("{{ strftime_now('%B %-d, %Y, %H:%M') }}", "July 26, 2024, 00:00"),
        ("{% set f = '%A' %}{{ strftime_now(f) }}", "Friday"),
        ("{% if strftime_now is defined %}{{ strftime_now('%y') }}{% endif %}", "24"),
        ("{% macro today() %}{{ strftime_now('%j') }}{% endmacro %}{{ today() }}", "208"),
    ],
)
def test_date_is_the_same_every_day(date, expected, with_chat_template, monkeypatch, caplog):
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    chat_rendering._without_clock.cache_clear()
    template = f"{date}{{% for m in messages %}}|{{{{ m.content }}}}{{% endfor %}}"
    with caplog.at_level(logging.WARNING):
        prompts = {render_chat(with_chat_template(template), WHERE) for _ in range(3)}
    assert prompts == {(f"{expected}|Where?|", "")}
    assert [record.message for record in caplog.records] == [
        "the tokenizer's chat template writes the date: prompts have 2024-07-26, on every day"
    ]


def test_every_directive_of_the_clock_is_fixed(with_chat_template):
    letters = "aAwdbBmyYHIpMSfjUWcxXGuVDeFTR"
    template = (
        "{{ strftime_now('" + " ".join(f"%{letter}" for letter in letters) + "') }}{{ messages[0].content }}"
    )
    day = chat_rendering.DATE
    expected = " ".join(day.strftime(f"%{letter}") for letter in letters)
    assert render_template(with_chat_template(template), WHERE) == f"{expected}Where?"
