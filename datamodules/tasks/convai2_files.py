"""Persona-Chat dialogues (Zhang et al., ACL 2018, 1801.07243) as ConvAI2 (Dinan et al., 2019, arXiv 1902.00098) has them.

Two formats, both with the own persona in its original words and the right reply as the last candidate: ParlAI's text files
(``train_self_original.txt``), and persona-chat's JSON entries (TransferTransfo's ``personachat_self_original.json``, the hub).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gatera_lightning.datamodules.sources.files import file_json, file_rows, file_text
from gatera_lightning.errors import ConfigError

_PERSONA = "your persona: "


@dataclass(frozen=True)
class Turn:
    """What the partner says, the own reply to it, and the replies to choose from, the own one being the last."""

    partner: str
    reply: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Dialogue:
    """One conversation: the own persona's sentences, and the turns in order."""

    number: int
    """From 1, within its file."""

    persona: tuple[str, ...]
    turns: tuple[Turn, ...]


def parlai_dialogues(name: str) -> Iterator[Dialogue]:
    r"""The dialogues of a ParlAI text file at a path or web address.

    A line is ``N text``, and N is 1 where a dialogue begins. First ``N your persona: …`` lines, then a turn a line,
    ``N partner\treply\t\tcandidate|…|reply``. Raises ConfigError naming file, line and what was expected.
    """
    number, persona, turns, previous = 0, list[str](), list[Turn](), 0
    for place, line in enumerate(file_text(name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            count, _, text = line.partition(" ")
            if count == "1":
                if previous and not turns:
                    raise ValueError("expected a turn before the next dialogue begins")
                if turns:
                    yield Dialogue(number, tuple(persona), tuple(turns))
                number, persona, turns = number + 1, [], []
            elif count != str(previous + 1):
                numbers = " or ".join(dict.fromkeys(["1", str(previous + 1)]))
                raise ValueError(f"expected a line that begins with {numbers} and a space")
            previous = int(count)
            if "\t" in text:
                turns.append(_turn(text))
            elif not text.startswith(_PERSONA) or turns:
                also = "" if turns else f"'{previous} {_PERSONA}…' or "
                raise ValueError(rf"expected {also}a turn, '{previous} partner\treply\t\tcandidate|…|reply'")
            else:
                persona.append(text.removeprefix(_PERSONA).strip())
        except ValueError as error:
            raise ConfigError(f"{name}, line {place}: {error}, found {line!r:.70}") from error
    if previous and not turns:
        raise ConfigError(f"{name}, line {place}: expected a turn, found the end of the file")
    if turns:
        yield Dialogue(number, tuple(persona), tuple(turns))


def _turn(text: str) -> Turn:
    fields = [field.strip() for field in text.split("\t")]
    if len(fields) != 4:
        raise ValueError(
            rf"expected four fields, 'partner\treply\t\tcandidate|…|reply', which makes {len(fields)}"
        )
    partner, reply, _, listed = fields
    candidates = tuple(candidate.strip() for candidate in listed.split("|"))
    if not partner or not reply:
        raise ValueError("expected a text of the partner and a reply, and one of them is empty")
    if candidates[-1] != reply:
        raise ValueError(f"expected the reply as the last candidate, which is {candidates[-1]!r:.40}")
    return Turn(partner, reply, candidates)


def persona_chat_dialogues(entries: Iterable[tuple[str, Any]]) -> Iterator[Dialogue]:
    """The dialogues of persona-chat's JSON entries, each with the words that say where it stands.

    An entry is ``{"personality": [sentence, …], "utterances": [{"candidates": […], "history": […]}, …]}``, a history being
    all that was said before. Raises ConfigError naming place, field and what was expected.
    """
    for number, (where, entry) in enumerate(entries, 1):
        for field in ("personality", "utterances"):
            if not isinstance(entry, dict) or not isinstance(entry.get(field), list):
                raise ConfigError(f"{where}: expected a field {field!r} with a list")
        if not _texts(entry["personality"]):
            raise ConfigError(
                f"{where}: field 'personality': expected sentences, found {entry['personality']!r:.70}"
            )
        if not entry["utterances"]:
            raise ConfigError(f"{where}: field 'utterances': expected at least one")
        turns = []
        for turn, utterance in enumerate(entry["utterances"]):
            if not isinstance(utterance, dict):
                raise ConfigError(
                    f"{where}, utterance {turn + 1}: expected fields 'history' and 'candidates'"
                )
            history: Any = utterance.get("history")
            candidates: Any = utterance.get("candidates")
            if not _texts(history) or len(history) != 2 * turn + 1:
                raise ConfigError(
                    f"{where}, utterance {turn + 1}: field 'history': expected a list of {2 * turn + 1} texts"
                )
            if not candidates or not _texts(candidates):
                raise ConfigError(
                    f"{where}, utterance {turn + 1}: field 'candidates': expected a list of texts"
                )
            replies = tuple(candidate.strip() for candidate in candidates)
            turns.append(Turn(history[-1].strip(), replies[-1], replies))
        yield Dialogue(number, tuple(sentence.strip() for sentence in entry["personality"]), tuple(turns))


def persona_chat_file(name: str, section: str) -> Iterator[Dialogue]:
    """The dialogues of a section (train, valid) of a JSON file at a path or web address, or of a file of bare entries.

    Raises ConfigError as :func:`persona_chat_dialogues` does.
    """
    if name.endswith(".jsonl"):
        yield from persona_chat_dialogues(file_rows(name))
        return
    found = file_json(name)
    if isinstance(found, dict):
        if section not in found:
            raise ConfigError(
                f"{name}: expected a field {section!r} with dialogues, found {', '.join(found) or 'no field'}"
            )
        found, name = found[section], f"{name}, {section}"
    if not isinstance(found, list):
        raise ConfigError(f"{name}: expected a list of dialogues, found {type(found).__name__}")
    yield from persona_chat_dialogues(
        (f"{name}, row {number}", entry) for number, entry in enumerate(found, 1)
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
