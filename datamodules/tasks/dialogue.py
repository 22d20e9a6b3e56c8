"""Dialogue with a persona: each own reply, given the persona and what was said before it (ConvAI2; Persona-Chat)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.base import unknown
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.leakage import Leakage
from gatera_lightning.datamodules.prompts.dialogue_prompts import DialoguePrompts
from gatera_lightning.datamodules.sources.files import hub_rows, source_name, split_slice
from gatera_lightning.datamodules.tasks.base import TaskFamily
from gatera_lightning.datamodules.tasks.convai2_files import (
    Dialogue,
    parlai_dialogues,
    persona_chat_dialogues,
    persona_chat_file,
)
from gatera_lightning.datamodules.tasks.personas import persona_numbers, shared_personas
from gatera_lightning.errors import ConfigError

SplitBy = Literal["dialogue", "persona"]


@dataclass(frozen=True)
class _Sourced:
    """A dialogue of a split: where it stands, the task it belongs to, and the group it is held out with."""

    where: str
    task: str
    group: str
    dialogue: Dialogue


class DialogueDataModule(TaskFamily):
    """One row for every own reply of a dialogue, self-persona setting; a slice of a source counts dialogues, or personas.

    The right reply is always kept, the others where they are ranked: ``test``, and validation with ``rank_validation``.
    """

    free_text = True
    ranking = "hits@1"
    suffixes = (".txt", ".json", ".jsonl")
    tasks = ("convai2", "smalltalk")
    sample_tasks = ("smalltalk",)

    def __init__(
        self, *, split_by: SplitBy = "dialogue", max_history_turns: int | None = None, **family: Any
    ) -> None:
        """Dialogues as ParlAI's text files (.txt), as persona-chat's JSON, or from the hub.

        ConvAI2's test split is secret; ``test`` reads a hub data set's or a JSON file's validation split, as is usual.

        Args:
            split_by: What stays together where rows are held out for validation, and what a source's slice counts: dialogue;
                or persona, all dialogues whose personas have two sentences in common. Slices of one file then share none.
            max_history_turns: Earlier turns shown before the partner's last text, the newest ones; null for all. However many,
                the oldest are left out until prompt and reply fit into max_length; the persona stays.
            family: Template, sources and what else every family can be told: see :class:`TaskFamily`.
        """
        super().__init__(**family)
        self.split_by = split_by
        self.max_history_turns = max_history_turns
        self._prompts: DialoguePrompts | None = None

    def problems(self, stage: str) -> list[str]:
        """Everything about these settings that cannot work, missing files included; reads no rows."""
        found = super().problems(stage)
        if self.train_on == "every_response":
            found.append(
                "data.train_on: every_response; accepted: response, all. Every own reply is a row of its own already"
            )
        if self.split_by not in get_args(SplitBy):
            found.append(unknown("split_by", self.split_by, get_args(SplitBy)))
        if self.max_history_turns is not None and self.max_history_turns < 0:
            found.append(
                f"data.max_history_turns: {self.max_history_turns}; accepted: null, or an integer of at least 0"
            )
        return found

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the data the backbone's tokenizer. Raises ConfigError when it lacks the chat template that is asked for."""
        super().connect(tokenizer)
        self._prompts = DialoguePrompts(self.template, tokenizer)

    def task_file(self, task: str, split: str) -> str:
        """ConvAI2's files have ParlAI's names."""
        if task == "convai2":
            return f"{task}/{'train' if split == 'train' else 'valid'}_self_original.txt"
        return f"{task}/{split}.txt"

    def examples(self, split: str) -> Iterator[Example]:
        """The example of every own reply in a split's dialogues, in order."""
        ranked = split == "test" or (
            self.rank_validation and (split == "validation" or self.held_out is not None)
        )
        for sourced in self._dialogues(split, ranked=ranked):
            said: list[str] = []
            for number, turn in enumerate(sourced.dialogue.turns, 1):
                said.append(turn.partner)
                row = {
                    "persona": sourced.dialogue.persona,
                    "history": tuple(said),
                    "candidates": turn.candidates,
                    "group": sourced.group,
                }
                try:
                    yield self.example(row, sourced.task)
                except ValueError as error:
                    raise ConfigError(f"{sourced.where}, turn {number}: {error}") from error
                said.append(turn.reply)

    def example(self, row: dict[str, Any], task: str) -> Example:
        """One own reply: ``persona``, ``history`` (the partner first and last), ``candidates`` (the reply last), ``group``."""
        if self._prompts is None:
            raise RuntimeError("the data module has no tokenizer yet: call connect(tokenizer) first")
        persona, history, replies = row["persona"], row["history"], row["candidates"]
        shown = history if self.max_history_turns is None else history[-1 - 2 * self.max_history_turns :]
        prompt, answers = self._prompts.fitting(persona, shown, replies, self.max_length)
        return Example(
            prompt,
            answers,
            len(replies) - 1,
            task,
            labels=replies,
            identity="\n".join([*persona, *history, replies[-1]]),
            group=row["group"],
            chat=self.template == "chat",
        )

    def leakage(self) -> list[Leakage]:
        """As for every family; where personas are kept apart, also which dialogues have a persona that is trained on."""
        found = super().leakage()
        if self.split_by == "persona":
            trained = [sourced.dialogue.persona for sourced in self._in_table("train")]
            for split in ("validation", "test"):
                try:
                    dialogues = self._in_table(split)
                except ConfigError:  # said above
                    continue
                if dialogues:
                    found.append(
                        shared_personas(trained, [sourced.dialogue.persona for sourced in dialogues], split)
                    )
        return found

    def _in_table(self, split: str) -> list[_Sourced]:
        """The dialogues that a split has once rows are held out."""
        held_out = self.held_out is not None and split == "validation"
        dialogues = self._dialogues("train" if held_out else split, ranked=False)
        if split not in self.tables:
            return dialogues
        groups = set(self.tables[split]["group"])
        return [sourced for sourced in dialogues if sourced.group in groups]

    def _dialogues(self, split: str, *, ranked: bool) -> list[_Sourced]:
        """The dialogues of a split's sources, in order, with all candidates or with the right reply alone."""
        found = []
        for source in self.sources[split]:
            name, part = split_slice(source)
            dialogues = [dialogue if ranked else _unranked(dialogue) for dialogue in self._read(name, split)]
            chosen = range(len(dialogues))[part]
            for dialogue, number in zip(dialogues, self._numbers(dialogues), strict=True):
                if number in chosen:
                    where = f"{name}, dialogue {dialogue.number}"
                    found.append(_Sourced(where, source_name(source), where, dialogue))
        if self.split_by == "persona":  # over all sources, which may share some
            numbers = persona_numbers([sourced.dialogue.persona for sourced in found])
            return [
                replace(sourced, group=f"persona {number}")
                for sourced, number in zip(found, numbers, strict=True)
            ]
        return found

    def _numbers(self, dialogues: list[Dialogue]) -> list[int]:
        """What a slice of these dialogues counts."""
        if self.split_by == "persona":
            return persona_numbers([dialogue.persona for dialogue in dialogues])
        return list(range(len(dialogues)))

    def _read(self, name: str, split: str) -> Iterator[Dialogue]:
        file = self._file(name, split)
        if file is None:
            return persona_chat_dialogues(hub_rows(name, "train" if split == "train" else "validation"))
        if file.endswith(".txt"):
            return parlai_dialogues(file)
        return persona_chat_file(file, "train" if split == "train" else "valid")


def _unranked(dialogue: Dialogue) -> Dialogue:
    """A dialogue with the right reply of each turn as its only candidate: a training set has 2.6 million others."""
    return replace(dialogue, turns=tuple(replace(turn, candidates=(turn.reply,)) for turn in dialogue.turns))
