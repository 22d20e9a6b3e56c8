"""Prompt templates: what the model reads before its answer.

A prompt never ends in a space. The space between prompt and answer is the answer's first character, because
``"Answer:" + " cats"`` tokenises like the running text and ``"Answer: " + "cats"`` does not.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Template = Literal["alpaca", "plain", "chat"]

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{request}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{request}\n\n### Input:\n{context}\n\n### Response:\n"
)
_PLAIN = "Question: {request}\nAnswer:"
_ANSWER = "the answer"  # stands in for one where a chat template is asked what it puts around it
_RULES = "the rules"  # likewise for a system message

Message = dict[Literal["role", "content"], str]
"""One turn of a conversation, as chat templates take it."""


def render(
    template: Template,
    request: str,
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    context: str = "",
) -> tuple[str, list[str]]:
    """The prompt for a request, and the text of each answer as it follows the prompt.

    alpaca is Stanford Alpaca's instruction format, where ``context`` is the input; plain is question and answer, and chat one
    user turn in the chat template of ``tokenizer``, whose special tokens are then part of the text: in both, ``context``
    follows the request after an empty line. Raises ValueError for an unknown template and for chat without a tokenizer that
    has one.
    """
    if template == "alpaca":
        return (_ALPACA_WITH_INPUT if context else _ALPACA).format(request=request, context=context), list(
            answers
        )
    if context:
        request = f"{request}\n\n{context}"
    if template == "plain":
        return _PLAIN.format(request=request), [f" {answer}" for answer in answers]
    if template == "chat":
        prompt, lead = chat_prompt(tokenizer, [{"role": "user", "content": request}])
        return prompt, [lead + answer for answer in answers]
    raise ValueError(f"unknown template {template!r}; accepted: {', '.join(get_args(Template))}")


def chat_prompt(tokenizer: PreTrainedTokenizerBase | None, turns: Sequence[Message]) -> tuple[str, str]:
    """Some turns and the opening of the assistant's, as text with special tokens, and the space before an answer, if any.

    Raises ValueError for a tokenizer without a template, and for turns that the template refuses.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    asked: list[dict[str, str]] = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        prompt = str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
        answered = str(tokenizer.apply_chat_template([*asked, answer], tokenize=False))
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses these turns: {error}") from error
    lead = answered.removeprefix(prompt).partition(_ANSWER)[0] if answered.startswith(prompt) else ""
    return prompt, lead if lead.isspace() else ""


def shows_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows a system message: some refuse it, and some leave it out."""
    turns = [{"role": "system", "content": _RULES}, {"role": "user", "content": "a question"}]
    try:
        return _RULES in tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return False


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that has to follow an answer before EOS: the one that closes a turn, as text; empty where that is EOS, or none.

    Training on a turn that never closes would teach an instruct model to talk on.
    """
    closing = turn_close(tokenizer)
    return "" if closing == tokenizer.eos_token else closing


def turn_close(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token with which the chat template closes an assistant's turn, as text; empty without one.

    White space before it is not part of it.
    """
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    closing = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(_ANSWER)[2].lstrip()
    ids = tokenizer(closing, add_special_tokens=False).input_ids
    special = {
        *tokenizer.all_special_ids,
        *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    if not ids or ids[0] not in special:
        return ""
    return str(tokenizer.convert_ids_to_tokens(ids[0]))
