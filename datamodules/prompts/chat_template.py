"""The tokenizer's chat template: rendering messages with it, and finding out how it marks turns.

Chat templates are arbitrary Jinja programs. Their conventions are found out by rendering short conversations,
not by looking for known tokens, and what they write is compared with the messages that they were given.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.template_checks import (
    check_contents,
    check_structure,
)
from gatera_lightning.datamodules.prompts.template_messages import Message, escape_texts, template_messages
from gatera_lightning.datamodules.tokenization.chat_rendering import render_template
from gatera_lightning.datamodules.tokenization.control_tokens import (
    THOUGHT_END,
    THOUGHT_START,
    control_tokens,
    unescape,
)

_PLACEHOLDER_ANSWER = "the answer"
_PLACEHOLDER_SYSTEM = "the rules"
_EMPTY_THOUGHT_AT_END = re.compile(rf"{THOUGHT_START}\s*{THOUGHT_END}\s*\Z")
_EMPTY_THOUGHT = re.compile(rf"\s*{THOUGHT_START}\s*{THOUGHT_END}\s*")


class ChatPrompt(NamedTuple):
    """A prompt of a chat template."""

    text: str
    """With control tokens as text. Those that messages spell out are escaped."""

    separator: str
    """What stands between the prompt and an answer: white space (often none), or the end of a thought that
    the prompt opens."""


def render_chat(
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
) -> ChatPrompt:
    """Render messages and the opening of the assistant's next turn.

    If the template has no generation prompt, or an incomplete one, the opening is what it writes before the
    text of an answer.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The conversation so far; empty if the assistant speaks first.
        tools: JSON schemas of the tools that the model may call.

    Raises:
        ValueError: The tokenizer has no chat template, or the template rejects the messages, or writes
            something else than these messages in this order.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    check_structure(tokenizer, messages, tools, generation_prompt=True)
    conversation, schemas = template_messages(tokenizer, messages), escape_texts(tokenizer, list(tools))
    answer = {"role": "assistant", "content": _PLACEHOLDER_ANSWER}
    answered = render_template(tokenizer, [*conversation, *template_messages(tokenizer, [answer])], schemas)
    try:
        prompt = render_template(tokenizer, conversation, schemas, generation_prompt=True)
    except ValueError:
        if any(message["role"] == "user" for message in messages):
            raise
        opening = answered.rpartition(_PLACEHOLDER_ANSWER)[0]  # the assistant speaks first
        check_contents(tokenizer, opening, messages)
        return _split_opening(_EMPTY_THOUGHT_AT_END.sub("", opening))  # which an answer may do without
    end = check_contents(tokenizer, prompt, messages)
    between = ""
    if answered.startswith(prompt):
        between, found, _ = answered.removeprefix(prompt).partition(_PLACEHOLDER_ANSWER)
        if not found:
            raise ValueError("the tokenizer's chat template does not write the text of assistant messages")
    opening = prompt[end:]
    if opening.count(THOUGHT_START) > opening.count(THOUGHT_END):
        closing = ("" if prompt.endswith("\n") else "\n") + f"\n{THOUGHT_END}\n\n"
        return ChatPrompt(prompt, between if THOUGHT_END in between else closing)
    if not answered.startswith(prompt):
        before_answer = answered.rpartition(_PLACEHOLDER_ANSWER)[0]
        history = render_template(tokenizer, conversation, schemas)
        return _reconcile(tokenizer, prompt, before_answer, history, messages)
    if not between.strip():
        return ChatPrompt(prompt, between)
    if _EMPTY_THOUGHT.fullmatch(between):  # the answer may start without one
        return ChatPrompt(prompt, "")
    return _split_opening(prompt + between)


def _reconcile(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    before_answer: str,
    history: str,
    messages: Sequence[Message],
) -> ChatPrompt:
    """The prompt of a template that writes something else before an answer than its generation prompt.

    Args:
        tokenizer: The tokenizer of the template.
        prompt: The messages with the generation prompt.
        before_answer: What the template writes before an answer.
        history: The messages alone.
        messages: The messages.

    Raises:
        ValueError: The generation prompt has more than the header of a response.
    """
    if prompt == history:  # there is no generation prompt
        try:
            check_contents(tokenizer, before_answer, messages)
        except ValueError:  # some write the system message into the last turn only
            return ChatPrompt(prompt, "")
        return _split_opening(before_answer)
    header = before_answer.removeprefix(history) if before_answer.startswith(history) else ""
    extra = prompt.removeprefix(history).removeprefix(header)
    if header.strip() and prompt == history + header + extra and not _EMPTY_THOUGHT.fullmatch(extra):
        raise ValueError(
            f"the tokenizer's chat template opens a response with {extra.strip()!r:.60}, which it does not "
            f"write before the text of one; accepted: nothing, or {THOUGHT_START}"
        )
    return ChatPrompt(prompt, "")


def render_response(
    tokenizer: PreTrainedTokenizerBase,
    history: Sequence[Message],
    response: Message,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[str, str]:
    """Render a conversation and the response that the model learns, with the thought and the tools it uses.

    Returns:
        The prompt as in :func:`render_chat`, and the response as it follows the prompt.

    Raises:
        ValueError: As in :func:`render_chat`, or the template cannot represent the response.
    """
    prompt, separator = render_chat(tokenizer, history, tools)
    escape = control_tokens(tokenizer).escape
    is_opened = THOUGHT_END in separator
    if is_opened and _continues_thought(response):
        return prompt, escape(response["content"], response=True)
    thought, content = _split_thought(response)
    if response.get("tool_calls") or (thought is not None and response.get("reasoning_content")):
        written = _written_response(tokenizer, prompt, history, response, tools)
        if written is not None:
            return prompt, written
        if response.get("tool_calls"):
            raise ValueError(
                "the tokenizer's chat template does not write the response with its tool_calls after its own "
                "generation prompt; accepted: responses without tool_calls, or another chat template"
            )
        if THOUGHT_START not in str(tokenizer.chat_template):
            raise ValueError(
                "the tokenizer's chat template does not write reasoning_content; accepted: messages without "
                "it, or another chat template"
            )
    if thought is None:
        return prompt, separator + escape(content, response=True)
    if not is_opened and THOUGHT_END in prompt[check_contents(tokenizer, prompt, history) :]:
        raise ValueError(
            "the response has a thought, but the tokenizer's chat template closes the thought before it; "
            "accepted: responses without thoughts, or another chat template"
        )
    if is_opened:  # the prompt has the first marker
        answer = thought.removeprefix("\n") if prompt.endswith("\n") else thought
    else:
        answer = f"{separator}{THOUGHT_START}{thought}"
    return prompt, escape(f"{answer}{THOUGHT_END}{content}", response=True)


def _continues_thought(response: Message) -> bool:
    """Whether a response ends a thought that it did not open, as in the data of DeepSeek R1."""
    content = response["content"]
    return (
        not response.get("reasoning_content")
        and content.count(THOUGHT_END) == 1
        and THOUGHT_START not in content
    )


def _split_thought(response: Message) -> tuple[str | None, str]:
    """The thought of a response, as it stands between its markers, or None; and the rest of the response.

    Raises:
        ValueError: The response has more than one thought, or one that does not end.
    """
    content = response["content"]
    if reasoning := response.get("reasoning_content"):
        if THOUGHT_START in content or THOUGHT_END in content:
            raise ValueError(f"a response has reasoning_content and also {THOUGHT_START} in its content")
        return "\n{}\n".format(reasoning.strip("\n")), f"\n\n{content}"
    if not content.lstrip().startswith(THOUGHT_START):
        if THOUGHT_END in content and THOUGHT_START not in content.partition(THOUGHT_END)[0]:
            raise ValueError(
                f"a response ends a thought with {THOUGHT_END} that neither it nor the chat template opens"
            )
        return None, content
    thought, end, rest = content.lstrip().removeprefix(THOUGHT_START).partition(THOUGHT_END)
    if not end or THOUGHT_START in thought:
        raise ValueError(f"a response opens a thought with {THOUGHT_START} that it does not close")
    return thought, rest


def _written_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    history: Sequence[Message],
    response: Message,
    tools: Sequence[dict[str, Any]],
) -> str | None:
    """What the template itself writes for a response; None if that does not continue the prompt.

    Templates trim contents; what is learned has the white space of the data.
    """
    check_structure(tokenizer, [*history, response], tools, generation_prompt=False)
    conversation = template_messages(tokenizer, [*history, response])
    written = render_template(tokenizer, conversation, escape_texts(tokenizer, list(tools)))
    if not written.startswith(prompt):
        return None
    answer = written.removeprefix(prompt).rstrip()
    for token in {end_of_turn(tokenizer), str(tokenizer.eos_token)} - {""}:
        answer = answer.removesuffix(token)
    thought, content = response.get("reasoning_content", "").strip(), response["content"]
    if thought not in unescape(answer):
        return None
    escaped = control_tokens(tokenizer).escape(content, response=True)
    start = answer.find(THOUGHT_END) + 1 if thought else 0
    place = answer.find(escaped.strip(), start)
    if place < 0:
        return None
    if escaped in answer[start:] or not content.strip():
        return answer
    before, after = answer[:place].rstrip(" "), answer[place + len(escaped.strip()) :]
    return f"{before}{escaped}{after.lstrip(' ')}"


def supports_system_message(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template renders system messages; some reject them, and some ignore them."""
    messages = [
        {"role": "system", "content": _PLACEHOLDER_SYSTEM},
        {"role": "user", "content": "a question"},
    ]
    try:
        return _PLACEHOLDER_SYSTEM in render_template(tokenizer, template_messages(tokenizer, messages))
    except ValueError:
        return False


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the special token with which the chat template ends an assistant turn, as text.

    Returns:
        The token without white space before it; empty if the turn does not end in a special token.
    """
    messages = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": _PLACEHOLDER_ANSWER},
    ]
    rendered = render_template(tokenizer, template_messages(tokenizer, messages))
    ids = tokenizer(rendered.rpartition(_PLACEHOLDER_ANSWER)[2].lstrip(), add_special_tokens=False).input_ids
    added_special_ids = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    if not ids or ids[0] not in {*tokenizer.all_special_ids, *added_special_ids}:
        return ""
    return str(tokenizer.convert_ids_to_tokens(ids[0]))


def answer_suffix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text to append to an answer before EOS, so that an instruct model learns to end its turn.

    Returns:
        The chat template's end-of-turn token; empty if that is EOS, which every answer gets anyway, or if
        there is none.
    """
    token = end_of_turn(tokenizer)
    return "" if token == tokenizer.eos_token else token


def _split_opening(text: str) -> ChatPrompt:
    """Divide what precedes an answer: spaces at the end belong to the answer."""
    prompt = text.rstrip(" ")
    return ChatPrompt(prompt, text[len(prompt) :])
