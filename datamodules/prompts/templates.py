"""Prompt templates: how a request becomes the text that the model reads before its answer.

No prompt ends in a space. The space between prompt and answer belongs to the answer, because ``"Answer:" + "
cats"`` is tokenized like running text and ``"Answer: " + "cats"`` is not.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.chat_template import render_chat
from gatera_lightning.datamodules.tokenization.control_tokens import control_tokens

Template = Literal["alpaca", "plain", "chat"]
"""Stanford Alpaca's instruction format; ``Question: … Answer:``; or the tokenizer's chat template."""

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{request}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{request}\n\n### Input:\n{context}\n\n### Response:\n"
)
_PLAIN = "Question: {request}\nAnswer:"


def render(
    template: Template,
    request: str,
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    context: str = "",
) -> tuple[str, list[str]]:
    """Render the prompt for a request, and its answers as they follow the prompt.

    Args:
        template: The prompt template.
        request: The question or instruction.
        answers: The candidate answers.
        tokenizer: The tokenizer, whose control tokens are escaped in all texts; None escapes nothing.
            ``chat`` needs one with a chat template, where the request is one user message.
        context: What the request is about: the input in ``alpaca``; elsewhere it follows the request after an
            empty line.

    Returns:
        The prompt, and each answer with the white space that separates it from the prompt. The prompt of
        ``chat`` contains the template's special tokens as text.

    Raises:
        ValueError: The template is unknown, or it is ``chat`` and the tokenizer has no chat template.
    """
    if tokenizer is not None:
        escape = control_tokens(tokenizer).escape
        answers = [escape(answer, response=True) for answer in answers]
        if template != "chat":  # which escapes messages itself
            request, context = escape(request), escape(context)
    if template == "alpaca":
        form = _ALPACA_WITH_INPUT if context else _ALPACA
        return form.format(request=request, context=context), list(answers)
    if context:
        request = f"{request}\n\n{context}"
    if template == "plain":
        return _PLAIN.format(request=request), [f" {answer}" for answer in answers]
    if template == "chat":
        prompt, separator = render_chat(tokenizer, [{"role": "user", "content": request}])
        return prompt, [separator + answer for answer in answers]
    raise ValueError(f"unknown template {template!r}; accepted: {', '.join(get_args(Template))}")
