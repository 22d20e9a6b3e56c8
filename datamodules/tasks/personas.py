"""Which dialogues have the same persona.

Every dialogue of Persona-Chat shows four or five sentences of its persona, not always the same ones, and
different personas may share a sentence ("i have a dog ."). Two shared sentences are taken as evidence for the
same persona.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from gatera_lightning.datamodules.overlap import SplitOverlap

Persona = Sequence[str]
"""The sentences of a persona that a dialogue shows."""


def persona_pairs(persona: Persona) -> set[tuple[str, ...]]:
    """Return all pairs of sentences, ignoring case and white space; a lone sentence forms a tuple of one."""
    sentences = sorted({" ".join(sentence.casefold().split()) for sentence in persona})
    return set(combinations(sentences, min(2, len(sentences)))) if sentences else set()


def persona_ids(personas: Sequence[Persona]) -> list[int]:
    """Assign an id to the persona of every dialogue.

    Dialogues that share two sentences have the same persona, and so do dialogues that are connected by others
    that do. A dialogue without persona sentences gets an id of its own.

    Args:
        personas: The persona of each dialogue.

    Returns:
        The id of each dialogue's persona, from 0 in order of appearance.
    """
    # Disjoint sets: each dialogue points to an earlier one of the same persona, or to itself.
    parents = list(range(len(personas)))

    def root(dialogue: int) -> int:
        while parents[dialogue] != dialogue:
            parents[dialogue] = dialogue = parents[parents[dialogue]]
        return dialogue

    first_with: dict[tuple[str, ...], int] = {}
    for dialogue, persona in enumerate(personas):
        for pair in persona_pairs(persona):
            parents[root(dialogue)] = root(first_with.setdefault(pair, dialogue))
    roots = [root(dialogue) for dialogue in range(len(personas))]
    ids = {dialogue: i for i, dialogue in enumerate(dict.fromkeys(roots))}
    return [ids[dialogue] for dialogue in roots]


@dataclass(frozen=True)
class PersonaOverlap(SplitOverlap):
    """Dialogues of a split that share a persona with the training split; ``str()`` is a one-line report."""

    def __str__(self) -> str:
        subject = f"{self.other}/{self.split} persona overlap"
        if not self.indices:
            return f"{subject}: none of {self.size:,} {self.split} dialogues"
        first = ", ".join(map(str, self.indices[:5])) + (", …" if len(self.indices) > 5 else "")
        return (
            f"{subject}: {len(self.indices):,} of {self.size:,} {self.split} dialogues have a persona of "
            f"{self.other} (indices {first}). They are not removed; slices of one file never share a persona."
        )


def find_persona_overlap(
    training: Sequence[Persona], personas: Sequence[Persona], split: str
) -> PersonaOverlap:
    """Find the dialogues of a split that share two persona sentences with a training dialogue.

    Args:
        training: The persona of each training dialogue.
        personas: The persona of each dialogue of the split.
        split: Name of the split.
    """
    seen = set[tuple[str, ...]]().union(*map(persona_pairs, training))
    indices = tuple(index for index, persona in enumerate(personas) if persona_pairs(persona) & seen)
    return PersonaOverlap(split, len(personas), indices)
