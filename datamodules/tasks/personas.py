"""Which dialogues have the same persona.

A dialogue of Persona-Chat shows four or five of its persona's sentences, not always the same ones, and different personas
share a sentence now and then ("i have a dog ."). Two sentences in common are taken for the same persona.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from gatera_lightning.datamodules.leakage import Leakage

Persona = Sequence[str]


def persona_pairs(persona: Persona) -> set[tuple[str, ...]]:
    """Every two sentences of a persona, up to case and white space; of a persona of one sentence, that one."""
    sentences = sorted({" ".join(sentence.casefold().split()) for sentence in persona})
    return set(combinations(sentences, min(2, len(sentences)))) if sentences else set()


def persona_numbers(personas: Sequence[Persona]) -> list[int]:
    """The number of each dialogue's persona, from 0 in order of appearance; equal for those with two sentences in common.

    So are those that a third one joins. A dialogue without persona has one of its own.
    """
    joined = list(
        range(len(personas))
    )  # each dialogue to an earlier one of its persona, the first one to itself

    def first(dialogue: int) -> int:
        while joined[dialogue] != dialogue:
            joined[dialogue] = dialogue = joined[joined[dialogue]]
        return dialogue

    seen: dict[tuple[str, ...], int] = {}
    for dialogue, persona in enumerate(personas):
        for pair in persona_pairs(persona):
            joined[first(dialogue)] = first(seen.setdefault(pair, dialogue))
    firsts = [first(dialogue) for dialogue in range(len(personas))]
    numbers = {dialogue: number for number, dialogue in enumerate(dict.fromkeys(firsts))}
    return [numbers[dialogue] for dialogue in firsts]


@dataclass(frozen=True)
class SharedPersonas(Leakage):
    """Which dialogues of a split have a persona that is trained on; as text, one line that says so."""

    def __str__(self) -> str:
        if not self.rows:
            return f"leakage: none of the {self.of:,} {self.split} dialogues has a persona that is trained on"
        first = ", ".join(map(str, self.rows[:5])) + (", …" if len(self.rows) > 5 else "")
        return (
            f"leakage: {len(self.rows):,} of {self.of:,} {self.split} dialogues have a persona that is trained on (numbers "
            f"from 0: {first}). They stay in; take slices of one file, which are cut between personas."
        )


def shared_personas(trained: Sequence[Persona], personas: Sequence[Persona], split: str) -> SharedPersonas:
    """The dialogues of ``split`` that have two persona sentences in common with a training dialogue."""
    seen = set[tuple[str, ...]]().union(*map(persona_pairs, trained))
    rows = tuple(row for row, persona in enumerate(personas) if persona_pairs(persona) & seen)
    return SharedPersonas(split, len(personas), rows)
