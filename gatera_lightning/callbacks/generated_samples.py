"""Samples of what the model generates during training, with the gates of their tokens."""

import html
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from gatera_lightning.adapters.lookup import has_token_gates, needs_masks
from gatera_lightning.backbone.loading import context_length
from gatera_lightning.callbacks.run_logs import has_run_log, run_logs
from gatera_lightning.datamodules.batch import PromptBatch
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.errors import printable
from gatera_lightning.gate_analysis.capture import capture_gates
from gatera_lightning.gate_analysis.plots.canvas import draw_pixels
from gatera_lightning.gate_analysis.plots.colored_text import draw_colored_text
from gatera_lightning.gate_analysis.token_labels import token_labels
from gatera_lightning.generation.decoding import DecodingConfig, end_tokens, generate
from gatera_lightning.generation.streaming import TextStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A prompt and the response that the model generated."""

    token_ids: list[int]
    """The prompt and the response."""

    prompt_length: int
    """The number of prompt tokens."""

    gates: np.ndarray | None
    """(tokens,): the mean gate over all modules; None without token gates."""


class GeneratedSamples(L.Callback):
    """After every validation, log what the model generates from a few prompts.

    Logs texts ``samples/<number>``, in which response tokens with a mean gate of at least 0.5 are bold. If
    gates depend on the token, also logs images ``samples/<number>`` with each token on the color of its gate.

    Decoding is greedy and draws no random numbers, so training does not change. All prompts form one batch.
    With a sharded model, every rank takes part.

    They go to TensorBoard, Weights & Biases and MLflow. If the run has only other loggers, there are no
    samples, and one warning says so. If the model's own code fails to generate, one warning says why and no
    more samples are generated; training continues.

    Example:
        >>> trainer = Trainer(callbacks=[GeneratedSamples(prompts=["Question: Why?\\nAnswer:"])])
    """

    def __init__(self, prompts: int | list[str] = 3, max_new_tokens: int = 16) -> None:
        """Log what the model generates after each validation.

        Args:
            prompts: Number of validation examples whose prompts are completed, or texts to complete; 0 turns
                the samples off.
            max_new_tokens: Maximum length of a response in tokens. Every token costs one forward pass, so
                each validation takes longer by about one or two training steps with the default.

        Raises:
            ValueError: ``prompts`` is negative, a boolean or contains an empty text, or ``max_new_tokens`` is
                less than 1.
        """
        usable = prompts >= 0 if isinstance(prompts, int) else all(text.strip() for text in prompts)
        if not usable or isinstance(prompts, bool):
            raise ValueError(
                f"generated_samples.prompts: {prompts}; accepted: 0, a number of examples, or texts, none of "
                "them empty"
            )
        if max_new_tokens < 1:
            raise ValueError(
                f"generated_samples.max_new_tokens: {max_new_tokens}; accepted: an integer of at least 1"
            )
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self._prompts: list[list[int]] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        data: Any = getattr(trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        self._prompts = []
        if not self.prompts or tokenizer is None:
            return
        if not has_run_log(trainer, "generated samples", missing="no samples are generated"):
            return
        if needs_masks(module.model):
            if trainer.is_global_zero:
                log.warning(
                    "generated samples: none, because the adapter's gates need a mask with every forward "
                    "pass; set generated_samples.prompts to 0"
                )
            return
        if not isinstance(self.prompts, int):
            prompts = [tokenize_prompt(tokenizer, text) for text in self.prompts]
        elif "validation" in data.tables:
            # Plain texts have no prompt, and perhaps not even a BOS to begin with.
            prompts = [ids for ids in data.tables["validation"][: self.prompts]["prompt"] if ids]
        else:
            prompts = []
        limit = context_length(module.model.config)
        longest = None if limit is None else limit - self.max_new_tokens
        self._prompts = [ids for ids in prompts if longest is None or len(ids) <= longest]
        if len(self._prompts) < len(prompts) and trainer.is_global_zero:
            log.warning(
                "generated samples: skipped %d of %d prompts, which are longer than %d tokens (the model's "
                "context minus max_new_tokens %d)",
                len(prompts) - len(self._prompts),
                len(prompts),
                longest,
                self.max_new_tokens,
            )

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prompts = []

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._prompts:  # turned off, or a validation outside of training
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # exists if there are prompts
        module: Any = pl_module
        try:
            samples = self._generate(module, data.tokenizer)
        except (
            Exception
        ) as error:  # training never runs the model's own code for cached decoding, which may be wrong
            if module.device_mesh is not None and isinstance(error, torch.OutOfMemoryError):
                raise  # other ranks may have enough memory, and would wait for this one
            self._prompts = []
            log.warning(
                "generated samples: %s failed to generate (%s: %s); no more samples are generated",
                type(module.model).__name__,
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )
            return
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        for number, sample in enumerate(samples, 1):
            picture = None if sample.gates is None else _picture(sample, data.tokenizer, f"step {step}")
            for run_log in run_logs(trainer):
                run_log.log_html(f"samples/{number}", sample_html(sample, data.tokenizer), step)
                if picture is not None:
                    run_log.log_picture(f"samples/{number}", picture, step)

    def _generate(self, pl_module: L.LightningModule, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """Complete all prompts; a collective for a sharded model. Validation has set the eval mode."""
        module: Any = pl_module
        batch: PromptBatch = collate_prompts(
            self._prompts,
            range(len(self._prompts)),
            pad_id=tokenizer.pad_token_id,
            eos_id=tokenizer.eos_token_id,
        )
        batch["input_ids"] = batch["input_ids"].to(module.device)
        batch["attention_mask"] = batch["attention_mask"].to(module.device)
        # Generate one token more than is shown: only then has the model read the last shown token, and
        # computed its gates.
        decoding = DecodingConfig(max_new_tokens=self.max_new_tokens + 1)
        with capture_gates(module.model) as captured:
            generated = generate(
                module.model, batch, decoding, in_step=module.device_mesh is not None
            ).tolist()
        gated = has_token_gates(module.model)
        ends = end_tokens(module.model, batch["eos_id"])
        samples = []
        for row, (prompt, response) in enumerate(zip(self._prompts, generated, strict=True)):
            length = next((i for i, token in enumerate(response) if token in ends), self.max_new_tokens)
            ids = prompt + response[: min(length, self.max_new_tokens)]
            gates = captured.row(row)[1][:, : len(ids)].mean(0, dtype=float) if gated else None
            samples.append(Sample(ids, len(prompt), gates))
        return samples


def sample_html(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Format a sample with the few HTML tags that TensorBoard allows, as the other loggers do.

    Args:
        sample: The sample.
        tokenizer: The tokenizer of the model.

    Returns:
        The prompt as a quotation, then the response with tokens of mean gate ≥ 0.5 in bold. Markup and
        control characters of the text are escaped.
    """
    pieces: list[str] = []

    def add(piece: str, gate: float | None) -> None:
        text = html.escape(printable(piece)).replace("\n", "<br>")
        pieces.append(f"<strong>{text}</strong>" if gate is not None and gate >= 0.5 else text)

    stream = TextStream(tokenizer, add)
    for index, token in enumerate(sample.token_ids[sample.prompt_length :], sample.prompt_length):
        stream.read(token, None if sample.gates is None else float(sample.gates[index]))
    stream.end()
    prompt = html.escape(printable(str(tokenizer.decode(sample.token_ids[: sample.prompt_length]))))
    return f"<blockquote>{prompt.replace(chr(10), '<br>')}</blockquote><p>{''.join(pieces)}</p>"


def _picture(sample: Sample, tokenizer: PreTrainedTokenizerBase, title: str) -> np.ndarray:
    assert sample.gates is not None
    labels = token_labels(tokenizer, sample.token_ids)
    figure = draw_colored_text(labels, sample.gates, sample.prompt_length, title)
    with warnings.catch_warnings():
        # A box replaces a character that the font lacks; the logged text has the character itself.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        return draw_pixels(figure)
