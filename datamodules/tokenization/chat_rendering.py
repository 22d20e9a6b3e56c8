"""The tokenizer's chat template as a function of its messages: rendered within bounds, and without a clock.

Chat templates are Jinja programs that come with a tokenizer, and may loop, fail or write today's date.
"""

import logging
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import cache
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DATE = date(2024, 7, 26)
"""What templates that ask for today's date get, so that prompts do not change overnight.

The templates of Llama 3 write this date if they are not given any.
"""

MAX_SECONDS = 10.0
"""Processor time that one rendering may take; templates of real models take milliseconds."""

_MAX_LENGTH = 10_000_000  # characters of a rendering, beyond 100 per character of the messages
_DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAwdbBmyYHIpMSfjUWcxXDeFTRGuV"))
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")


def render_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    *,
    generation_prompt: bool = False,
) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The messages, as the template expects them.
        tools: JSON schemas of the tools that the model may call.
        generation_prompt: Whether to open the assistant's next turn.

    Raises:
        ValueError: The template rejects the messages, fails, loops, or depends on chance.
    """
    try:
        source = tokenizer.get_chat_template(None, list(tools) or None)
    except Exception as error:
        raise ValueError(f"the tokenizer's chat template cannot be used: {_sentence(error)}") from error
    if found := _RANDOM.search(source):
        raise ValueError(
            f"the tokenizer's chat template depends on chance ({found[0]}), so prompts would differ from run "
            "to run; accepted: a template that depends on its messages only"
        )
    try:
        with _bounded_time():
            text = tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=_without_clock(source),
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
    except _TooLong:
        raise ValueError(
            f"the tokenizer's chat template did not end within {MAX_SECONDS:g} seconds on these messages"
        ) from None
    except Exception as error:  # whatever a program from the internet raises
        problem = f"the tokenizer's chat template rejects these messages: {_sentence(error)}"
        raise ValueError(problem) from error
    text = str(text)
    if len(text) > _MAX_LENGTH + 100 * len(repr(messages)):
        raise ValueError(f"the tokenizer's chat template writes {len(text):,} characters for these messages")
    return text


class _TooLong(BaseException):
    """The template took too long. No Exception, so that no template can catch it."""


@contextmanager
def _bounded_time() -> Iterator[None]:
    """Raise _TooLong after MAX_SECONDS of processor time; unbounded outside of the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@cache
def _without_clock(source: str) -> str:
    """A template in which ``strftime_now`` formats ``DATE``; the same template if it does not use that."""
    if "strftime_now" not in source:
        return source
    log.warning("the tokenizer's chat template writes the date: prompts have %s, on every day", DATE)
    replacements = "".join(f".replace('{part}', {DATE.strftime(part)!r})" for part in _DIRECTIVES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replacements} }}}}{{%- endmacro -%}}{source}"


def _sentence(error: Exception) -> str:
    """An error on one line, with its type unless it is Jinja's own."""
    text = " ".join(str(error).split())[:300]
    is_jinja = type(error).__module__.partition(".")[0] == "jinja2"
    return text if is_jinja and text else f"{type(error).__name__}: {text}".rstrip(": ")
