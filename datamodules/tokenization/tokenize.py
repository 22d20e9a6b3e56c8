"""From prompts and answers to tensors: where an answer begins, what is cut, what carries loss."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch, PromptBatch

TrainOn = Literal["response", "every_response", "all"]
"""What carries loss: the answer; in a conversation, the earlier responses in its prompt too; or the whole prompt too."""


@dataclass(frozen=True)
class Example:
    """One prompt and its candidate answers, ``answers[gold]`` being the right one."""

    prompt: str
    answers: list[str]
    gold: int
    task: str

    labels: Sequence[str] = ()
    """What each candidate is recognised by in generated text; default: the answers themselves."""

    identity: str = ""
    """What makes this the same question elsewhere, whatever the template; default: prompt and answers."""

    group: str = ""
    """Rows of one group are held out together; default: the row is a group of its own."""

    chat: bool = False
    """The prompt was written by the tokenizer's chat template, special tokens included."""

    earlier: Sequence[tuple[int, int]] = ()
    """Earlier responses in the prompt, as ranges of its characters."""

    shortened: bool = False
    """Turns of the prompt were left out, so that it fits."""

    @property
    def key(self) -> str:
        """16 hex digits of the question: equal for rows that differ in case or white space only."""
        parts = [self.identity] if self.identity else [self.prompt, *self.answers]
        text = "\n".join(" ".join(part.casefold().split()) for part in parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answers: Sequence[str],
    max_length: int,
    *,
    special_tokens: bool = True,
    turn_end: str = "",
) -> tuple[list[int], list[list[int]], bool]:
    """Token ids of a prompt and of its candidate answers (each with EOS), and whether the prompt was shortened.

    Prompt and answer are tokenised together and cut where the prompt ends, so the boundary is what running text would
    give. ``special_tokens`` is False where the prompt holds them as text, and ``turn_end`` follows each answer, before
    EOS: chat templates write both. When the longest candidate does not fit into ``max_length``, the prompt loses tokens
    after its BOS, the same for every candidate. Raises ValueError when an answer leaves no room for any prompt token.
    """
    prompt_ids = tokenise_prompt(tokenizer, prompt, special_tokens=special_tokens)
    candidates = []
    for answer in answers:
        joint = list(tokenizer(prompt + answer + turn_end, add_special_tokens=special_tokens).input_ids)
        if joint[-1] == tokenizer.eos_token_id:
            joint.pop()
        if joint[: len(prompt_ids)] == prompt_ids:
            answer_ids = joint[len(prompt_ids) :]
        else:  # a token spans the boundary: the prompt must stay what generation will see
            answer_ids = list(tokenizer(answer + turn_end, add_special_tokens=False).input_ids)
        candidates.append([*answer_ids, tokenizer.eos_token_id])
    longest = max(len(ids) for ids in candidates)
    room = max_length - longest
    if len(prompt_ids) <= room:
        return prompt_ids, candidates, False
    bos = prompt_ids[:1] if prompt_ids[:1] == [tokenizer.bos_token_id] else []
    if room < len(bos) + 1:
        raise ValueError(
            f"an answer has {longest} tokens, which leaves no room for a prompt in max_length {max_length}"
        )
    return bos + prompt_ids[len(prompt_ids) - room + len(bos) :], candidates, True


def tokenise_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, special_tokens: bool = True
) -> list[int]:
    """The tokens of a text that goes on: without the EOS that some tokenizers put behind every text."""
    ids = list(tokenizer(prompt, add_special_tokens=special_tokens).input_ids)
    if special_tokens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def token_ranges(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ranges: Sequence[tuple[int, int]],
    prompt_ids: Sequence[int],
    *,
    special_tokens: bool = True,
) -> list[tuple[int, int]]:
    """Ranges of a prompt's characters as ranges of ``prompt_ids``, which :func:`tokenise` made of it, shortened or not.

    A token belongs to the range in which its first character stands; what was cut off is in none. Raises ValueError for a
    tokenizer that does not know which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "train_on every_response needs a fast tokenizer, which knows the characters of each token"
        )
    offsets = tokenizer(prompt, add_special_tokens=special_tokens, return_offsets_mapping=True).offset_mapping
    cut = len(tokenise_prompt(tokenizer, prompt, special_tokens=special_tokens)) - len(prompt_ids)
    kept = 1 if cut and prompt_ids[0] == tokenizer.bos_token_id else 0  # BOS, before what is left
    found = []
    for start, end in ranges:
        # Tokens that stand for no character (BOS, a space that the tokenizer trims) begin no range and end none.
        inside = [
            place for place, (first, last) in enumerate(offsets) if start <= first < end and first < last
        ]
        if inside and inside[-1] - cut >= kept:
            found.append((max(inside[0] - cut, kept), inside[-1] - cut + 1))
    return found


def target_ranges(
    prompt: int, length: int, earlier: Sequence[Sequence[int]], train_on: TrainOn
) -> list[tuple[int, int]]:
    """Ranges of the tokens that carry loss in a row of ``length`` tokens, ``prompt`` of them before the answer.

    The first token of a row has no predecessor, and is no target even where there is no prompt.
    """
    if train_on == "all":
        return [(1, length)]
    responses = [*earlier, (prompt, length)] if train_on == "every_response" else [(prompt, length)]
    return [(max(1, start), end) for start, end in responses]


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt with one answer, ready to be padded."""

    prompt_ids: list[int]
    answer_ids: list[int]
    example_id: int = -1
    answer: int = 0
    gold: int = 0
    characters: int = 1
    earlier: Sequence[Sequence[int]] = ()

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def collate(
    rows: Sequence[AnsweredPrompt],
    *,
    pad_id: int,
    train_on: TrainOn,
    all_candidates_present: bool = False,
    lines: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Right-pad rows into a Batch whose step totals are its own.

    ``lines`` packs them: which rows (their numbers) stand behind each other in each line. Labels are masked by length, never by
    token: pad and EOS are the same token in many tokenizers, and EOS is a target. The first token of a row has no
    predecessor and therefore never a label. Rows with ``example_id`` -1 get neither labels nor real tokens beyond what
    attention needs.
    """
    placed = [[row] for row in range(len(rows))] if lines is None else lines
    width = max(sum(rows[row].length for row in line) for line in placed)
    input_ids = torch.full((len(placed), width), pad_id)
    attention_mask = torch.zeros(len(placed), width, dtype=torch.long)
    position_ids = torch.zeros(len(placed), width, dtype=torch.long)
    labels = torch.full((len(placed), width), IGNORE_INDEX)
    response_mask = torch.zeros(len(placed), width, dtype=torch.bool)
    for i, line in enumerate(placed):
        begin = 0
        for row in (rows[number] for number in line):
            ids = torch.tensor(row.prompt_ids + row.answer_ids)
            here = slice(begin, begin + len(ids))
            input_ids[i, here] = ids
            attention_mask[i, here] = 1
            position_ids[i, here] = torch.arange(len(ids))
            response_mask[i, begin + len(row.prompt_ids) : begin + len(ids)] = True
            if row.example_id >= 0:
                for start, end in target_ranges(len(row.prompt_ids), len(ids), row.earlier, train_on):
                    labels[i, begin + start : begin + end] = ids[start:end]
            begin += len(ids)
        position_ids[i, begin:] = torch.arange(width - begin)  # padding is a row of its own
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        response_mask=response_mask,
        example_ids=torch.tensor([row.example_id for row in rows]),
        step_supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        step_tokens=int(attention_mask.sum()),
        answer_ids=torch.tensor([row.answer for row in rows]),
        gold_ids=torch.tensor([row.gold for row in rows]),
        answer_characters=torch.tensor([row.characters for row in rows]),
        all_candidates_present=all_candidates_present,
    )
    if lines is not None:
        batch["position_ids"] = position_ids
    return batch


def collate_prompts(
    prompts: Sequence[Sequence[int]], example_ids: Sequence[int], *, pad_id: int, eos_id: int
) -> PromptBatch:
    """Left-pad prompts into a PromptBatch."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, ids in enumerate(prompts):
        input_ids[i, width - len(ids) :] = torch.tensor(ids)
        attention_mask[i, width - len(ids) :] = 1
    return PromptBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        example_ids=torch.tensor(example_ids),
        pad_id=pad_id,
        eos_id=eos_id,
    )
