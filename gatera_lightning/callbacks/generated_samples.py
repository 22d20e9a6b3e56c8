"""What the model writes, validation after validation, with the gates of what it reads and writes."""

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

from gatera_lightning.adapters.lookup import has_token_gates
from gatera_lightning.backbone.loading import context_length
from gatera_lightning.callbacks.tensorboard_loggers import tensorboard_loggers
from gatera_lightning.datamodules.batch import PromptBatch
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.gate_analysis.capture import capture_gates
from gatera_lightning.gate_analysis.plots.canvas import draw_pixels
from gatera_lightning.gate_analysis.plots.colored_text import draw_colored_text
from gatera_lightning.gate_analysis.token_labels import token_labels
from gatera_lightning.generation.decoding import DecodingConfig, end_tokens, generate
from gatera_lightning.generation.streaming import TextStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A prompt and what was written after it; tokens from ``prompt`` on are the response."""

    ids: list[int]
    prompt: int
    gates: np.ndarray | None
    """(tokens,): the mean over modules; None without token gates."""


class GeneratedSamples(L.Callback):
    """After every validation of ``fit``, what the model writes after a few prompts, to TensorBoard.

    Texts ``samples/<number>``, in which tokens of the response with a mean gate of at least 0.5 are bold, and pictures
    ``samples/<number>`` with every token on the colour of its gate, where gates depend on tokens. The most likely tokens are
    taken, so nothing is drawn at random, and nothing in training changes by it. All prompts are one batch; every process takes
    part, as a sharded model needs. With a logger other than TensorBoard samples are skipped, with one line; a model that cannot
    write ends the samples, with another, and not the run.
    """

    def __init__(self, prompts: int | list[str] = 3, max_new_tokens: int = 16) -> None:
        """Let the model write.

        Args:
            prompts: How many of the first validation rows to answer, or texts to go on from; 0 for none.
            max_new_tokens: Tokens after which a response is cut. Each costs a forward: a validation takes longer by as much as
                a step or two.
        """
        usable = prompts >= 0 if isinstance(prompts, int) else all(text.strip() for text in prompts)
        if not usable or isinstance(prompts, bool):
            raise ValueError(
                f"generated_samples.prompts: {prompts}; accepted: 0, a number of rows, or texts, none of them empty"
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
        if not tensorboard_loggers(
            trainer, missing="generated samples need the TensorBoard logger: skipping them"
        ):
            return
        if isinstance(self.prompts, int):
            found = (
                list(data.tables["validation"][: self.prompts]["prompt"])
                if "validation" in data.tables
                else []
            )
        else:
            found = [tokenize_prompt(tokenizer, text) for text in self.prompts]
        limit = context_length(module.model.config)
        room = None if limit is None else limit - self.max_new_tokens
        self._prompts = [ids for ids in found if room is None or len(ids) <= room]
        if len(self._prompts) < len(found) and trainer.is_global_zero:
            log.warning(
                "generated samples: left out %d of %d prompts, longer than the %d tokens that max_new_tokens %d leaves them",
                len(found) - len(self._prompts),
                len(found),
                room,
                self.max_new_tokens,
            )

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prompts = []

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._prompts:  # also outside of training
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # there when there are prompts
        module: Any = pl_module
        try:
            samples = self._samples(module, data.tokenizer)
        except Exception as error:  # of the model's own code, which nothing else asks to go on from a cache
            if module.device_mesh is not None and isinstance(error, torch.OutOfMemoryError):
                raise  # the other processes may have had room, and would wait
            self._prompts = []
            log.warning(
                "generated samples: %s cannot write them (%s: %s); none from here on",
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
            for logger in tensorboard_loggers(trainer):
                logger.experiment.add_text(f"samples/{number}", markup(sample, data.tokenizer), step)
                if picture is not None:
                    logger.experiment.add_image(f"samples/{number}", picture, step, dataformats="HWC")

    def _samples(self, pl_module: L.LightningModule, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """A collective for a sharded model. In validation, models are in eval mode."""
        module: Any = pl_module
        batch: PromptBatch = collate_prompts(
            self._prompts,
            range(len(self._prompts)),
            pad_id=tokenizer.pad_token_id,
            eos_id=tokenizer.eos_token_id,
        )
        batch["input_ids"] = batch["input_ids"].to(module.device)
        batch["attention_mask"] = batch["attention_mask"].to(module.device)
        # One token more than is kept: by then the last one that is kept has been read, and its gates are known.
        decoding = DecodingConfig(max_new_tokens=self.max_new_tokens + 1)
        with capture_gates(module.model) as captured:
            written = generate(module.model, batch, decoding, in_step=module.device_mesh is not None).tolist()
        gated = has_token_gates(module.model)
        ends = end_tokens(module.model, batch["eos_id"])
        samples = []
        for row, (prompt, response) in enumerate(zip(self._prompts, written, strict=True)):
            length = next(
                (place for place, token in enumerate(response) if token in ends), self.max_new_tokens
            )
            ids = prompt + response[: min(length, self.max_new_tokens)]
            gates = captured.row(row)[1][:, : len(ids)].mean(0, dtype=float) if gated else None
            samples.append(Sample(ids, len(prompt), gates))
        return samples


def markup(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """A sample as the few tags that TensorBoard lets through; open tokens of the response are bold."""
    pieces: list[str] = []

    def add(piece: str, gate: float | None) -> None:
        text = html.escape(piece).replace("\n", "<br>")
        pieces.append(f"<strong>{text}</strong>" if gate is not None and gate >= 0.5 else text)

    stream = TextStream(tokenizer, add)
    for place, token in enumerate(sample.ids[sample.prompt :], sample.prompt):
        stream.read(token, None if sample.gates is None else float(sample.gates[place]))
    stream.end()
    prompt = html.escape(str(tokenizer.decode(sample.ids[: sample.prompt]))).replace("\n", "<br>")
    return f"<blockquote>{prompt}</blockquote><p>{''.join(pieces)}</p>"


def _picture(sample: Sample, tokenizer: PreTrainedTokenizerBase, title: str) -> np.ndarray:
    assert sample.gates is not None
    figure = draw_colored_text(token_labels(tokenizer, sample.ids), sample.gates, sample.prompt, title)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # a box in its place; the text has the character
        return draw_pixels(figure)
