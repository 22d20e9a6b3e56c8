"""Read the dialogues of ConvAI2 (Dinan et al., 2019, arXiv 1902.00098), which come from Persona-Chat (Zhang
et al., 2018).

There are two formats: the text files of ParlAI (``train_self_original.txt``), and the JSON of TransferTransfo
(``personachat_self_original.json``, also on the hub). Both have the model's own persona in its original
wording, and list the correct reply as the last candidate.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gatera_lightning.datamodules.sources.files import read_json, read_rows
from gatera_lightning.datamodules.sources.spec import data_suffix
from gatera_lightning.datamodules.sources.text_files import read_text
from gatera_lightning.errors import ConfigError

_PERSONA = "your persona: "
_TURN_FORMAT = r"partner\treply\t\tcandidate|…|reply"


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue."""

    partner: str
    """What the partner says."""

    reply: str
    """The correct reply."""

    candidates: tuple[str, ...]
    """Replies to choose from; the last one is the correct one."""


@dataclass(frozen=True)
class Dialogue:
    """One dialogue."""

    number: int
    """Position in its file, from 1."""

    persona: tuple[str, ...]
    """Sentences about the model's side."""

    turns: tuple[Turn, ...]


def read_parlai(location: str) -> Iterator[Dialogue]:
    r"""Yield the dialogues of a text file of ParlAI.

    Each line is ``N text``, where N is 1 at the beginning of a dialogue. A dialogue starts with lines ``N
    your persona: …``, followed by one line per turn, ``N partner\treply\t\tcandidate|…|reply``.

    Args:
        location: Path or URL.

    Raises:
        ConfigError: A line is malformed; the message names the file, the line and what was expected.
    """
    number, persona, turns, previous = 0, list[str](), list[Turn](), 0
    for line_number, line in enumerate(read_text(location).split("\n"), 1):
        if not line.strip():
            continue
        try:
            count, _, text = line.partition(" ")
            if count == "1":
                if previous and not turns:
                    raise ValueError("expected a turn before the next dialogue")
                if turns:
                    yield Dialogue(number, tuple(persona), tuple(turns))
                number, persona, turns = number + 1, [], []
            elif count != str(previous + 1):
                accepted = " or ".join(dict.fromkeys(["1", str(previous + 1)]))
                raise ValueError(f"expected a line that starts with {accepted} and a space")
            previous = int(count)
            if "\t" in text:
                turns.append(_parse_turn(text))
            elif not text.startswith(_PERSONA) or turns:
                or_persona = "" if turns else f"'{previous} {_PERSONA}…' or "
                raise ValueError(f"expected {or_persona}a turn, '{previous} {_TURN_FORMAT}'")
            else:
                persona.append(text.removeprefix(_PERSONA).strip())
        except ValueError as error:
            raise ConfigError(f"{location}, line {line_number}: {error}, found {line!r:.70}") from error
    if previous and not turns:
        raise ConfigError(f"{location}, line {line_number}: expected a turn, found the end of the file")
    if turns:
        yield Dialogue(number, tuple(persona), tuple(turns))


def _parse_turn(text: str) -> Turn:
    fields = [field.strip() for field in text.split("\t")]
    if len(fields) != 4:
        raise ValueError(f"expected 4 tab-separated fields, '{_TURN_FORMAT}', not {len(fields)}")
    partner, reply, _, listed = fields
    candidates = tuple(candidate.strip() for candidate in listed.split("|"))
    if not partner or not reply:
        raise ValueError("expected a text of the partner and a reply, but one of them is empty")
    if candidates[-1] != reply:
        raise ValueError(f"expected the reply as the last candidate, which is {candidates[-1]!r:.40}")
    return Turn(partner, reply, candidates)


def parse_persona_chat(entries: Iterable[tuple[str, Any]]) -> Iterator[Dialogue]:
    """Yield the dialogues of JSON entries ``{"personality": […], "utterances": [{"candidates": […],
    "history": […]}, …]}``.

    A history contains everything that was said before, the partner's last text included.

    Args:
        entries: Where each entry is, for error messages, and the entry.

    Raises:
        ConfigError: An entry is malformed; the message names the entry, the field and what was expected.
    """
    for number, (place, entry) in enumerate(entries, 1):
        for field in ("personality", "utterances"):
            if not isinstance(entry, dict) or not isinstance(entry.get(field), list):
                raise ConfigError(f"{place}: expected a field {field!r} with a list")
        if not _are_texts(entry["personality"]):
            raise ConfigError(
                f"{place}: field 'personality': expected sentences, found {entry['personality']!r:.70}"
            )
        if not entry["utterances"]:
            raise ConfigError(f"{place}: field 'utterances': expected at least one")
        turns = []
        for turn, utterance in enumerate(entry["utterances"]):
            at = f"{place}, utterance {turn + 1}"
            if not isinstance(utterance, dict):
                raise ConfigError(f"{at}: expected fields 'history' and 'candidates'")
            history: Any = utterance.get("history")
            candidates: Any = utterance.get("candidates")
            if not _are_texts(history) or len(history) != 2 * turn + 1:
                raise ConfigError(f"{at}: field 'history': expected a list of {2 * turn + 1} texts")
            if not candidates or not _are_texts(candidates):
                raise ConfigError(f"{at}: field 'candidates': expected a list of texts")
            replies = tuple(candidate.strip() for candidate in candidates)
            turns.append(Turn(history[-1].strip(), replies[-1], replies))
        yield Dialogue(number, tuple(sentence.strip() for sentence in entry["personality"]), tuple(turns))


def read_persona_chat(location: str, section: str) -> Iterator[Dialogue]:
    """Yield the dialogues of a JSON or JSON Lines file.

    Args:
        location: Path or URL of a JSON file with an object of sections, a JSON list, or JSON Lines.
        section: The section to read, ``train`` or ``valid``, if the file has sections.

    Raises:
        ConfigError: The file or an entry is malformed; see :func:`parse_persona_chat`.
    """
    if data_suffix(location).startswith(".jsonl"):
        yield from parse_persona_chat(read_rows(location))
        return
    entries = read_json(location)
    if isinstance(entries, dict):
        if section not in entries:
            raise ConfigError(
                f"{location}: expected a field {section!r} with dialogues, "
                f"found {', '.join(entries) or 'no field'}"
            )
        entries, location = entries[section], f"{location}, {section}"
    if not isinstance(entries, list):
        raise ConfigError(f"{location}: expected a list of dialogues, found {type(entries).__name__}")
    places = (f"{location}, row {number}" for number in range(1, len(entries) + 1))
    yield from parse_persona_chat(zip(places, entries, strict=True))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
