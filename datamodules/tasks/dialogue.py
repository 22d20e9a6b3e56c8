"""Dialogue with a persona: the replies of one side, given its persona and the history (ConvAI2)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.overlap import SplitOverlap
from gatera_lightning.datamodules.prompts.dialogue_prompts import DialoguePrompts
from gatera_lightning.datamodules.settings import integer_problems
from gatera_lightning.datamodules.sources.hub import read_hub_rows
from gatera_lightning.datamodules.sources.spec import Source, data_suffix
from gatera_lightning.datamodules.tasks.base import TaskDataModule
from gatera_lightning.datamodules.tasks.convai2_files import (
    Dialogue,
    parse_persona_chat,
    read_parlai,
    read_persona_chat,
)
from gatera_lightning.datamodules.tasks.personas import find_persona_overlap, persona_ids
from gatera_lightning.errors import ConfigError, printable, unknown_value

SplitBy = Literal["dialogue", "persona"]


@dataclass(frozen=True)
class _LocatedDialogue:
    """A dialogue of a split."""

    place: str
    """Where it is, for error messages."""

    task: str
    """Name of its source."""

    group: str
    """Dialogues of the same group are never divided between training and validation."""

    dialogue: Dialogue


class DialogueDataModule(TaskDataModule):
    """One example per reply of the side with the persona. Slices of sources count dialogues, or personas.

    Distractors are loaded only where candidates are ranked: in ``test``, and in ``validation`` with
    ``rank_validation``.
    """

    free_text = True
    ranking = "hits@1"
    suffixes = (".txt", ".json", ".jsonl", ".txt.gz", ".json.gz", ".jsonl.gz")
    tasks = ("convai2", "smalltalk")
    sample_tasks = ("smalltalk",)

    def __init__(
        self, *, split_by: SplitBy = "dialogue", max_history_turns: int | None = None, **common: Any
    ) -> None:
        """Set how dialogues are split and truncated.

        Sources are text files of ParlAI (.txt), JSON in the format of TransferTransfo, or a hub dataset. The
        test split of ConvAI2 is not public, so ``test`` reads the validation split of a JSON file or hub
        dataset, as published work does.

        Args:
            split_by: What is never divided between training and validation, and what the slice of a source
                counts: dialogue, or persona, all dialogues that share two persona sentences with each other.
                persona validates on personas that training never shows; its groups are larger, so the size of
                the validation split is less exact.
            max_history_turns: Number of earlier turns in the prompt; null for all of them. Fewer make
                training faster, and give the model less context. Turns that exceed max_length are dropped in
                any case, oldest first; the persona never is.
            common: Settings of :class:`TaskDataModule`.
        """
        super().__init__(**common)
        self.split_by = split_by
        self.max_history_turns = max_history_turns
        self._prompts: DialoguePrompts | None = None

    def problems(self, stage: str) -> list[str]:
        """Return every problem of the settings; see :meth:`TaskDataModule.problems`."""
        found = super().problems(stage)
        if self.train_on == "every_response":
            found.append(
                "data.train_on: every_response; accepted: response, all. "
                "Every reply is already an example of its own"
            )
        if self.split_by not in get_args(SplitBy):
            found.append(unknown_value("data.split_by", self.split_by, get_args(SplitBy)))
        found += integer_problems("max_history_turns", self.max_history_turns, least=0, optional=True)
        return found

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the backbone's tokenizer; see :meth:`TaskDataModule.connect`."""
        super().connect(tokenizer)
        self._prompts = DialoguePrompts(self.template, tokenizer)

    def task_file(self, task: str, split: str) -> str:
        """Return the text file of a task; those of ConvAI2 are named as in ParlAI."""
        if task == "convai2":
            return f"{task}/{'train' if split == 'train' else 'valid'}_self_original.txt"
        return f"{task}/{split}.txt"

    def examples(self, split: str) -> Iterator[Example]:
        """Yield one example per reply, dialogue by dialogue; see :meth:`TaskDataModule.examples`."""
        ranked = split == "test" or (
            self.rank_validation and (split == "validation" or self.held_out is not None)
        )
        for located in self._dialogues(split, ranked=ranked):
            history: list[str] = []
            for number, turn in enumerate(located.dialogue.turns, 1):
                history.append(turn.partner)
                row = {
                    "persona": located.dialogue.persona,
                    "history": tuple(history),
                    "candidates": turn.candidates,
                    "group": located.group,
                }
                place = f"{located.place}, turn {number}"
                try:
                    yield replace(self.example(row, located.task), place=place)
                except ValueError as error:
                    raise ConfigError(printable(f"{place}: {error}")) from error
                history.append(turn.reply)

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Build the example of one reply.

        Args:
            row: ``persona`` (sentences), ``history`` (texts, the partner's first and last), ``candidates``
                (the correct reply is the last), and ``group``.
            task: Name of the source.

        Raises:
            ValueError: The example exceeds ``max_length`` even without earlier turns.
        """
        if self._prompts is None:
            raise RuntimeError("the data module has no tokenizer yet: call connect(tokenizer) first")
        persona, history, replies = row["persona"], row["history"], row["candidates"]
        shown = history if self.max_history_turns is None else history[-1 - 2 * self.max_history_turns :]
        prompt, answers = self._prompts.render(persona, shown, replies, self.max_length)
        return Example(
            prompt,
            answers,
            len(replies) - 1,
            task,
            labels=replies,
            identity="\n".join([*persona, *history, replies[-1]]),
            request="\n".join([*persona, *history]),
            group=row["group"],
            chat=self.template == "chat",
        )

    def overlaps(self) -> list[SplitOverlap]:
        """Compare the splits as every task does and, with ``split_by: persona``, also their personas."""
        found = super().overlaps()
        if self.split_by == "persona":
            training = [located.dialogue.persona for located in self._dialogues_in_table("train")]
            for split in ("validation", "test"):
                try:
                    dialogues = self._dialogues_in_table(split)
                except ConfigError:  # super().overlaps() has reported it
                    continue
                if dialogues:
                    personas = [located.dialogue.persona for located in dialogues]
                    found.append(find_persona_overlap(training, personas, split))
        return found

    def _dialogues_in_table(self, split: str) -> list[_LocatedDialogue]:
        """The dialogues of a split after validation examples were taken from training."""
        held_out = self.held_out is not None and split == "validation"
        dialogues = self._dialogues("train" if held_out else split, ranked=False)
        if split not in self.tables:
            return dialogues
        groups = set(self.tables[split]["group"])
        return [located for located in dialogues if located.group in groups]

    def _dialogues(self, split: str, *, ranked: bool) -> list[_LocatedDialogue]:
        """The dialogues of a split's sources, in order, with all candidates or only the correct replies."""
        found = []
        for source in map(Source.parse, self.sources[split]):
            dialogues = [
                dialogue if ranked else _without_distractors(dialogue)
                for dialogue in self._read(source.location, split)
            ]
            numbers = self._slice_numbers(dialogues)
            if problem := self.report_slice(source, len(set(numbers)), split, f"{self.split_by}s"):
                raise ConfigError(printable(f"data.{split}: the split is empty: {problem}"))
            selected = range(len(dialogues))[source.rows]
            for dialogue, number in zip(dialogues, numbers, strict=True):
                if number in selected:
                    place = f"{source.location}, dialogue {dialogue.number}"
                    found.append(_LocatedDialogue(place, source.name, place, dialogue))
        if self.split_by == "persona":  # over all sources, because they may share personas
            ids = persona_ids([located.dialogue.persona for located in found])
            return [replace(located, group=f"persona {i}") for located, i in zip(found, ids, strict=True)]
        return found

    def _slice_numbers(self, dialogues: list[Dialogue]) -> list[int]:
        """The number that a slice of the source compares, for each dialogue."""
        if self.split_by == "persona":
            return persona_ids([dialogue.persona for dialogue in dialogues])
        return list(range(len(dialogues)))

    def _read(self, location: str, split: str) -> Iterator[Dialogue]:
        file = self._resolve_file(location, split)
        if file is None:
            return parse_persona_chat(read_hub_rows(location, "train" if split == "train" else "validation"))
        if data_suffix(file).startswith(".txt"):
            return read_parlai(file)
        return read_persona_chat(file, "train" if split == "train" else "valid")


def _without_distractors(dialogue: Dialogue) -> Dialogue:
    """A dialogue with only the correct replies; the training split of ConvAI2 has 2.6 million distractors."""
    return replace(dialogue, turns=tuple(replace(turn, candidates=(turn.reply,)) for turn in dialogue.turns))
