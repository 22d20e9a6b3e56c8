"""Instructions and chats: a row of people's own data as a conversation, and a conversation as a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.templates import (
    Message,
    Template,
    chat_prompt,
    render,
    shows_system,
    turn_close,
    turn_end,
)
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_example

COLUMNS = ("instruction", "input", "output", "messages")
"""What a row may hold: the first three, of which ``input`` may be absent or empty, or the last."""

_ROLES = ("system", "user", "assistant")
_NAMES = {
    "system": "",
    "user": "User: ",
    "assistant": "Assistant: ",
}  # before a message's text, in the plain template


@dataclass(frozen=True)
class Instruction:
    """A request, what it is about (perhaps nothing), and the response."""

    request: str
    context: str
    response: str


@dataclass(frozen=True)
class Chat:
    """Messages in order, perhaps a system message first; the last one, an assistant's, is the response."""

    messages: tuple[Message, ...]

    @property
    def response(self) -> str:
        """What the last message says."""
        return self.messages[-1]["content"]


def parse_conversation(row: Any, columns: Mapping[str, str]) -> Instruction | Chat:
    """A row with ``instruction``, ``output`` and perhaps ``input``, or with ``messages``; ``columns`` maps other names.

    >>> parse_conversation({"question": "Where is milk kept?", "output": "In the fridge."}, {"instruction": "question"})
    Instruction(request='Where is milk kept?', context='', response='In the fridge.')

    Raises ValueError, saying what was expected and which columns there are.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with columns, found {type(row).__name__}")
    names = {column: columns.get(column, column) for column in COLUMNS}
    fields = {column: row.get(name) for column, name in names.items()}
    if fields["messages"] is not None:
        if fields["instruction"] is not None and fields["output"] is not None:
            raise ValueError(
                f"columns {names['messages']!r} and {names['instruction']!r}: expected one of the two in a row"
            )
        return Chat(tuple(_messages(fields["messages"])))
    for column in ("instruction", "output"):
        name = names[column]
        if name not in row:
            also = "" if any(fields.values()) else f", and so is {names['messages']!r}"
            raise ValueError(
                f"column {name!r} is missing{also}; the row has {', '.join(map(str, row)) or 'no columns'}. "
                f"data.columns: {{{column}: NAME}} reads another one"
            )
    for column in ("instruction", "input", "output"):
        if not isinstance(fields[column], str) and fields[column] is not None:
            raise ValueError(f"column {names[column]!r}: expected a text, found {fields[column]!r:.60}")
    request, context, response = (
        (fields[column] or "").strip() for column in ("instruction", "input", "output")
    )
    if not request or not response:
        raise ValueError(f"column {names['output' if request else 'instruction']!r} is empty")
    return Instruction(request, context, response)


def _messages(found: Any) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"messages: expected a list of objects with role and content, found {found!r:.60}")
    messages: list[Message] = []
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            there = ", ".join(map(str, message)) if isinstance(message, dict) else repr(message)
            raise ValueError(f"message {number}: expected an object with role and content, found {there:.60}")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise ValueError(f"message {number}: role {role!r} is unknown; accepted: {', '.join(_ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}): expected a text as content, found {content!r:.60}")
        if role == "system" and number > 1:
            raise ValueError(f"message {number}: a system message stands first or nowhere")
        messages.append({"role": role, "content": content.strip()})
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if not turns or turns[-1] != "assistant":
        raise ValueError(
            f"the last message is the {messages[-1]['role']}'s; expected the assistant's, which is the response"
        )
    if turns[0] != "user":
        raise ValueError(f"the first turn is the {turns[0]}'s; expected the user's")
    return messages


@dataclass(frozen=True)
class Prompt:
    """What stands before a response, the response as it follows it, and the earlier responses in it by their characters."""

    text: str
    answer: str
    earlier: tuple[tuple[int, int], ...] = ()
    shortened: bool = False


@dataclass(frozen=True)
class ConversationPrompts:
    """Prompts in one template for one tokenizer; ``earlier`` asks for the places of earlier responses."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    earlier: bool = False

    def fitting(self, conversation: Instruction | Chat, max_length: int) -> Prompt:
        """The prompt of a conversation, a chat's oldest turns left out until prompt and response have ``max_length`` tokens.

        A system message stays. What is too long even so is for :func:`tokenize_example` to cut. Raises ValueError for an unknown
        template, and for a chat that the template cannot write.
        """
        if isinstance(conversation, Instruction):
            text, answers = render(
                self.template,
                conversation.request,
                [conversation.response],
                self.tokenizer,
                context=conversation.context,
            )
            return Prompt(text, answers[0])
        system = [message for message in conversation.messages if message["role"] == "system"]
        turns = conversation.messages[len(system) :]
        starts = [place for place, message in enumerate(turns) if message["role"] == "user"]
        for start in starts:
            prompt = self._chat([*system, *turns[start:]], shortened=start > 0)
            if start == starts[-1] or self._fits(prompt, max_length):
                break
        return prompt

    def _fits(self, prompt: Prompt, max_length: int) -> bool:
        special: dict[str, Any] = (
            {"special_tokens": False, "turn_end": self._end} if self.template == "chat" else {}
        )
        return not tokenize_example(self.tokenizer, prompt.text, [prompt.answer], max_length, **special)[2]

    def _chat(self, messages: Sequence[Message], *, shortened: bool) -> Prompt:
        *before, last = messages
        if self.template == "chat":
            if before[0]["role"] == "system" and not self._shows_system:
                system, first, *others = before
                before = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]
            text, lead = chat_prompt(self.tokenizer, before)
            return Prompt(
                text, lead + last["content"], self._places(before, text) if self.earlier else (), shortened
            )
        if self.template == "plain":
            text, places = "", []
            for message in before:
                text += _NAMES[message["role"]]
                said = message["content"]
                if (
                    message["role"] == "assistant"
                ):  # closed as an answer is: else the model would learn to talk on
                    said += self.tokenizer.eos_token
                    places.append(
                        (len(text) - 1, len(text) + len(said))
                    )  # with the space before it, as the answer has
                text += said + "\n"
            earlier = tuple(places) if self.earlier else ()
            return Prompt(text + _NAMES["assistant"].rstrip(), f" {last['content']}", earlier, shortened)
        if [message["role"] for message in before] not in (["user"], ["system", "user"]):
            raise ValueError(
                f"a chat of {len(messages)} messages; template {self.template} has one turn: use chat or plain"
            )
        request = "\n\n".join(message["content"] for message in before)
        text, answers = render(self.template, request, [last["content"]], self.tokenizer)
        return Prompt(text, answers[0], (), shortened)

    def _places(self, before: Sequence[Message], text: str) -> tuple[tuple[int, int], ...]:
        """Where each of the assistant's messages stands in a prompt, with the token that closes its turn."""
        places = []
        for number, message in enumerate(before):
            if message["role"] == "assistant":
                lead = chat_prompt(self.tokenizer, before[:number])[0]
                start = text.find(message["content"], len(lead))
                if not text.startswith(lead) or start < 0 or text[len(lead) : start].strip():
                    raise ValueError(
                        "train_on every_response: the tokenizer's chat template writes an earlier response otherwise than the "
                        "last one, so it cannot be trained on where it stands; accepted: response, all"
                    )
                end = start + len(message["content"])
                close = end + len(text[end:]) - len(text[end:].lstrip())
                if self._close and text.startswith(self._close, close):
                    end = close + len(self._close)
                places.append((len(lead), end))
        return tuple(places)

    @cached_property
    def _close(self) -> str:
        return turn_close(self.tokenizer)

    @cached_property
    def _end(self) -> str:
        return turn_end(self.tokenizer)

    @cached_property
    def _shows_system(self) -> bool:
        return shows_system(self.tokenizer)
