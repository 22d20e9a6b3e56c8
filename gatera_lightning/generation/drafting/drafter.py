"""Generate with drafts, in both cycles, greedily or by sampling."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer

from gatera_lightning.adapters.draft_adapter import DraftAdapter
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.backbone.probes import skips_hidden_columns
from gatera_lightning.datamodules.batch import PromptBatch
from gatera_lightning.errors import ConfigError
from gatera_lightning.generation.decoding import DecodingConfig, Sampling, end_tokens, generate
from gatera_lightning.generation.drafting.answer_end import AnswerEnd
from gatera_lightning.generation.drafting.checks import (
    block_problem,
    decoding_problems,
    model_problem,
    sliding_windows,
)
from gatera_lightning.generation.drafting.config import DraftConfig
from gatera_lightning.generation.drafting.counts import DraftCounts
from gatera_lightning.generation.drafting.joint import JointAnswers
from gatera_lightning.generation.drafting.passes import DraftPasses
from gatera_lightning.generation.drafting.payoff import Payoff
from gatera_lightning.generation.drafting.verification import (
    Draft,
    GreedyVerifier,
    SamplingVerifier,
    Verifier,
)


class Drafter:
    """Generates with a model and its draft adapter, several tokens per forward pass.

    A forward pass reads the newest token, then drafts, then noise: random tokens, or the adapter's mask
    embeddings. The draft adapter acts on the noise only, so all other rows have the model's own logits. These
    verify the drafts; what the noise computes proposes the next ones (UNO, arXiv 2609.04010; I-DLM, arXiv
    2604.11035; :class:`~gatera_lightning.generation.drafting.proposers.MaskEmbeddingProposer`).

    Args:
        model: The model, in eval mode.
        adapter: Its draft adapter.
        config: How to draft.
        new_payoff: Creates what decides whether drafts pay, for each number of prompts that share passes.

    Attributes:
        counts: What all answers so far took.

    Raises:
        ConfigError: If a setting is not valid, or the drafts of this model cannot be verified.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: DraftAdapter,
        config: DraftConfig | None = None,
        new_payoff: Callable[[], Payoff] = Payoff,
    ) -> None:
        config = config or DraftConfig()
        problems = config.problems()
        if not problems and (problem := block_problem(config.block, adapter.config)):
            problems = [f"draft.block: {problem}"]
        if not problems and (problem := model_problem(model, config.block)):
            problems = [problem]
        if problems:
            raise ConfigError(problems)
        self.config = config
        self.counts = DraftCounts()
        self._model, self._passes = model, DraftPasses(model, adapter, config)
        self._new_payoff = new_payoff
        self._payoffs: dict[int, Payoff] = {}  # by the number of prompts that share passes
        # A window is counted in columns of the cache, some of which a sequence of several has rejected.
        can_share = config.cycle == "two_forwards" and not sliding_windows(model)
        self._shares_passes = can_share and skips_hidden_columns(model)

    @property
    def turned_off(self) -> list[str]:
        """Why drafts are turned off, for each number of prompts that share passes; empty if they are not."""
        return [
            payoff.verdict + (f", with {prompts} prompts per pass" if prompts > 1 else "")
            for prompts, payoff in sorted(self._payoffs.items())
            if payoff.verdict is not None
        ]

    def generate(
        self,
        batch: PromptBatch,
        decoding: DecodingConfig,
        *,
        sampling: Sampling | None = None,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> Tensor:
        """Generate a completion of each prompt, as :func:`~gatera_lightning.generation.generate` does.

        Several prompts share forward passes with the cycle ``two_forwards``, unless the model has sliding
        windows or counts hidden columns of the cache; otherwise, they are answered one after another.

        Args:
            batch: Left-padded prompts.
            decoding: How to decode.
            sampling: Sample instead of taking the most likely tokens.
            streamer: Receives the tokens of a single prompt as they are chosen.
            stopping: Ends the answer to a single prompt; reads its tokens, but no scores.

        Returns:
            The generated token ids, (batch, new tokens), padded after the token that ends an answer.

        Raises:
            ConfigError: If drafts do not support a setting of the decoding.
        """
        if problems := decoding_problems(decoding):
            raise ConfigError(problems)
        end = AnswerEnd(
            end_tokens(self._model, batch["eos_id"]), limit=decoding.max_new_tokens, stopping=stopping
        )
        is_joint = self._shares_passes and len(batch["input_ids"]) > 1
        payoff = self._payoff_of(len(batch["input_ids"]) if is_joint else 1)
        # Only this package's loops know stopping criteria; they decode without drafts, too, and a bit slower.
        if payoff is not None and payoff.verdict is not None and stopping is None:
            plain = generate(self._model, batch, decoding, sampling=sampling, streamer=streamer)
            for answer in plain.tolist():
                tokens, _ = end.extend([], answer)
                self.counts.add_plain(tokens)
            return plain
        verifier = GreedyVerifier() if sampling is None else SamplingVerifier(sampling)
        thresholds = {"skip_below": decoding.skip_below, "merge_above": decoding.merge_above}
        prepared = prepared_for_inference(self._model, **thresholds) if decoding.prepared else nullcontext()
        with torch.no_grad(), prepared:
            if is_joint:
                joint = JointAnswers(
                    batch["input_ids"], batch["attention_mask"], end=end, pad_id=batch["pad_id"]
                )
                answers = joint.run(self._passes, verifier, self.counts, payoff)
            else:
                answers = [
                    self._answer(ids[mask.bool()].tolist(), end, verifier, payoff, streamer)
                    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
                ]
        found = torch.full((len(answers), max(map(len, answers))), batch["pad_id"])
        for row, answer in zip(found, answers, strict=True):
            row[: len(answer)] = torch.tensor(answer)
        return found.to(batch["input_ids"].device)

    def _answer(
        self,
        prompt: list[int],
        end: AnswerEnd,
        verifier: Verifier,
        payoff: Payoff | None,
        streamer: BaseStreamer | None,
    ) -> list[int]:
        """Return the completion of one prompt."""
        passes = self._passes
        cache = DynamicCache()  # without the config: a layer with a sliding window would forget tokens
        answer: list[int] = []
        unread, drafts = prompt, list[Draft]()  # tokens of the text that the cache does not hold
        if streamer is not None:
            streamer.put(torch.tensor([prompt]))
        while True:
            room = end.limit - len(answer) - len(drafts) - 1  # for tokens after those of this forward pass
            makes_drafts = payoff is None or payoff.allows_drafts
            noise = passes.noise_rows(drafts=len(drafts), useful=room - 1) if makes_drafts else 0
            is_prompt = unread is prompt
            if payoff is not None:
                payoff.start()
            tokens = [*unread, *(draft.token for draft in drafts), *passes.noise_tokens(noise)]
            ids = torch.tensor([tokens], device=self._model.device)
            logits, outputs = passes.run(ids, rows=1 + len(drafts) + noise, noise=noise, cache=cache)
            verdict = verifier.verify(logits[0], drafts)
            is_complete = verdict.accepted == len(drafts)
            chosen = [*(draft.token for draft in drafts[: verdict.accepted]), verdict.token]
            self._forget(cache, noise + len(drafts) - verdict.accepted)
            proposed = passes.proposer.propose(verifier, outputs[0], verdict.token) if is_complete else []
            added, has_ended = end.extend(answer, chosen, prompt)
            self.counts.add(added, drafts=len(drafts), accepted=verdict.accepted)
            if payoff is not None and not is_prompt:
                payoff.stop(added, drafts=len(drafts), noise=noise)
            if streamer is not None:
                for token in chosen[:added]:
                    streamer.put(torch.tensor([token]))
            if has_ended:
                if streamer is not None:
                    streamer.end()
                return answer
            unread, drafts = [verdict.token], proposed

    def _payoff_of(self, prompts: int) -> Payoff | None:
        """Return what measures passes that so many prompts share; None if drafts stay on in any case."""
        if not self.config.only_if_faster:
            return None
        if prompts not in self._payoffs:
            self._payoffs[prompts] = self._new_payoff()
        return self._payoffs[prompts]

    @staticmethod
    def _forget(cache: DynamicCache, rows: int) -> None:
        """Drop the keys and values of the last rows."""
        if rows:
            cache.crop(-rows)
