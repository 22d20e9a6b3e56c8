"""Generate for several prompts in the same forward passes, which draft and verify in turn."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import DynamicCache

from gatera_lightning.generation.drafting.answer_end import AnswerEnd
from gatera_lightning.generation.drafting.counts import DraftCounts
from gatera_lightning.generation.drafting.passes import DraftPasses
from gatera_lightning.generation.drafting.payoff import Payoff
from gatera_lightning.generation.drafting.verification import Draft, Verdict, Verifier


class JointAnswers:
    """The answers of several prompts, which share forward passes and a cache.

    Every sequence drafts in the same pass, and verifies in the next one. They accept different numbers of
    drafts: the cache keeps the columns that any of them needs, and the attention mask hides those that a
    sequence has rejected.

    Args:
        prompts: Left-padded token ids, (batch, tokens).
        mask: 1 for tokens, 0 for padding, (batch, tokens).
        end: Where an answer ends.
        pad_id: What stands in the rows of a sequence that has ended.

    Attributes:
        answers: The tokens of each answer so far.
    """

    def __init__(self, prompts: Tensor, mask: Tensor, *, end: AnswerEnd, pad_id: int) -> None:
        self.answers: list[list[int]] = [[] for _ in prompts]
        self._end, self._pad_id = end, pad_id
        self._unread, self._visible = prompts, mask.long()  # (batch, new columns), (batch, all columns)
        self._positions = (self._visible.cumsum(1) - 1).clamp_min(0)  # of the unread columns
        self._last_positions = self._positions[:, -1:] + end.limit  # that a sequence can have, (batch, 1)
        self._drafts: list[list[Draft]] = [[] for _ in prompts]
        self._cache = DynamicCache()  # without the config: see Drafter
        self._running = list(range(len(prompts)))

    def run(
        self,
        passes: DraftPasses,
        verifier: Verifier,
        counts: DraftCounts,
        payoff: Payoff | None,
    ) -> list[list[int]]:
        """Generate until every answer has ended.

        Args:
            passes: Runs the model.
            verifier: Verifies drafts.
            counts: What is counted, for each prompt that a pass answers.
            payoff: What is told about times, if anything.

        Returns:
            The answers.
        """
        is_prompt = True
        while self._running:
            drafts = self._drafts[self._running[0]]
            room = self._end.limit - min(len(self.answers[b]) for b in self._running) - len(drafts) - 1
            makes_drafts = payoff is None or payoff.allows_drafts
            noise = passes.noise_rows(drafts=len(drafts), useful=room - 1) if makes_drafts else 0
            if payoff is not None:
                payoff.start()
            ids, inputs = self._inputs(len(drafts), noise, passes.noise_tokens)
            rows = 1 + len(drafts) + noise
            logits, outputs = passes.run(ids, rows=rows, noise=noise, cache=self._cache, **inputs)
            running = len(self._running)
            verdicts = {b: verifier.verify(logits[b], self._drafts[b]) for b in self._running}
            proposed = {
                b: passes.proposer.propose(verifier, outputs[b], verdict.token)
                for b, verdict in verdicts.items()
            }
            chosen = self._advance(verdicts, proposed, len(drafts), noise, counts)
            if payoff is not None and not is_prompt:
                payoff.stop(chosen, prompts=running, drafts=len(drafts), noise=noise)
            is_prompt = False
        return self.answers

    def _inputs(
        self, count: int, noise: int, noise_tokens: Callable[[int], list[int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the token ids of the next forward pass, (batch, columns), its mask and its positions."""
        device, batch = self._unread.device, len(self.answers)
        drafted = [[draft.token for draft in drafts] or [self._pad_id] * count for drafts in self._drafts]
        added = torch.tensor(
            [[*row, *noise_tokens(noise)] for row in drafted], dtype=torch.long, device=device
        ).view(batch, count + noise)
        after = self._positions[:, -1:] + torch.arange(1, count + noise + 1, device=device)
        # Rows for the shortest answer can exceed the length of others, where a model may have no positions.
        after = torch.minimum(after, self._last_positions)
        self._visible = torch.cat([self._visible, torch.ones_like(added)], 1)
        positions = torch.cat([self._positions, after], 1)
        inputs = {"attention_mask": self._visible, "position_ids": positions}
        return torch.cat([self._unread, added], 1), inputs

    def _advance(
        self,
        verdicts: Mapping[int, Verdict],
        proposed: Mapping[int, list[Draft]],
        count: int,
        noise: int,
        counts: DraftCounts,
    ) -> int:
        """Add what was verified to every answer, and return how many tokens were chosen."""
        first = self._visible.shape[1] - noise - count  # column of the first draft
        unread, steps = [self._pad_id] * len(self.answers), [0] * len(self.answers)
        accepted_by_all, chosen = 0, 0
        for b, verdict in verdicts.items():
            tokens = [*(draft.token for draft in self._drafts[b][: verdict.accepted]), verdict.token]
            self._visible[b, first + verdict.accepted :] = 0
            self._drafts[b] = proposed[b]
            unread[b], steps[b] = verdict.token, verdict.accepted + 1
            added, has_ended = self._end.extend(self.answers[b], tokens)
            counts.add(added, drafts=count, accepted=verdict.accepted)
            chosen += added
            if has_ended:
                self._running.remove(b)
                self._drafts[b], steps[b] = [], 0
            else:
                accepted_by_all = max(accepted_by_all, verdict.accepted)
        if forgotten := noise + count - accepted_by_all:
            self._cache.crop(-forgotten)
            self._visible = self._visible[:, :-forgotten]
        device = self._unread.device
        self._visible = torch.cat([self._visible, torch.ones_like(self._visible[:, :1])], 1)
        self._positions = self._positions[:, -1:] + torch.tensor(steps, device=device).unsqueeze(1)
        self._unread = torch.tensor(unread, device=device).unsqueeze(1)
        return chosen
