"""What a task makes of one record of its data: a prompt with candidate answers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A prompt and its candidate answers, of which ``answers[gold]`` is the correct one."""

    prompt: str
    answers: list[str]
    gold: int

    task: str
    """Name under which results are reported."""

    labels: Sequence[str] = ()
    """Text by which each candidate is recognized in generated text; the answers themselves if empty."""

    identity: str = ""
    """Text that identifies the question regardless of the template; prompt and answers if empty."""

    request: str = ""
    """What ``identity`` contains besides the answer, if it contains the answer."""

    place: str = field(default="", compare=False)
    """Where the example comes from (``train.jsonl, row 3``), for messages; empty if unknown."""

    group: str = ""
    """Examples of one group stay in the same split; an example without a group is independent."""

    chat: bool = False
    """True if a chat template rendered the prompt, which then contains the special tokens as text."""

    earlier_responses: Sequence[tuple[int, int]] = ()
    """Earlier responses of a conversation, as character ranges ``(start, end)`` of the prompt."""

    truncated: bool = False
    """True if turns of a conversation were dropped from the prompt to fit ``max_length``."""

    @property
    def key(self) -> str:
        """16 hex digits that identify the question; equal up to case and white space."""
        return _digest([self.identity] if self.identity else [self.prompt, *self.answers])

    @property
    def request_key(self) -> str:
        """16 hex digits that identify the request, whatever its answer; ``key`` if requests are not known."""
        return _digest([self.request]) if self.request else self.key


def _digest(parts: Sequence[str]) -> str:
    text = "\n".join(" ".join(part.casefold().split()) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
