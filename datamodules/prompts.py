"""Prompt templates: what the model reads before its answer.

A prompt never ends in a space. The space between prompt and answer is the answer's first character, because
``"Answer:" + " cats"`` tokenises like the running text and ``"Answer: " + "cats"`` does not.
"""

from typing import Literal, get_args

Template = Literal["alpaca", "plain"]

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{request}\n\n### Response:\n"
)
_PLAIN = "Question: {request}\nAnswer:"


def render(template: Template, request: str, answer: str) -> tuple[str, str]:
    """Prompt and answer text for a request: alpaca (Stanford Alpaca's instruction format) or plain question/answer.

    Raises ValueError for an unknown template.
    """
    if template == "alpaca":
        return _ALPACA.format(request=request), answer
    if template == "plain":
        return _PLAIN.format(request=request), f" {answer}"
    raise ValueError(f"unknown template {template!r}; accepted: {', '.join(get_args(Template))}")
