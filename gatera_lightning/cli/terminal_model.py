"""A model that answers in the terminal: how ``chat`` and ``generate`` check, load and ask it, and show what it says."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from jinja2 import TemplateError
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gates import StaticGate
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.serialization import load_adapter, read_adapter_config, trained_template
from gatera_lightning.backbone.loading import (
    BackboneConfig,
    Dtype,
    context_length,
    device_here,
    load_backbone,
    load_config,
    load_tokenizer,
)
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.datamodules.prompts.conversations import Chat, ConversationPrompts, Instruction
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.errors import AdapterFileError, ConfigError
from gatera_lightning.gate_analysis.capture import capture_gates
from gatera_lightning.gate_analysis.plots.colored_text import color_by_gate, color_scale
from gatera_lightning.generation.decoding import DecodingConfig, Sampling, end_tokens, generate
from gatera_lightning.generation.streaming import TextStream

# Control characters except tab and line break, what no encoding takes, and what would turn the direction of a line.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Answer(NamedTuple):
    """What was said, and whether Ctrl-C cut it short."""

    text: str
    stopped: bool


class Speaker:
    """A backbone, with an adapter or without. Answers go to standard output as they come, all remarks to standard error."""

    def __init__(self, settings: argparse.Namespace, problems: Sequence[str] = ()) -> None:
        """Tokenizer and sizes only; weights are loaded with the first answer.

        ``settings`` are those of :func:`add_arguments`, and ``problems`` what else is wrong with a command line. Raises
        ConfigError with everything that cannot work.
        """
        self.settings = settings
        self.adapter: AdapterConfig | None = None
        self.backbone = self._checked(problems)
        self.tokenizer = load_tokenizer(self.backbone)
        if settings.template == "chat" and not self.tokenizer.chat_template:
            raise ConfigError(
                "--template: chat needs a tokenizer with a chat template, and this one has none; accepted: plain"
            )
        self.trained_template = None if self.adapter is None else trained_template(settings.adapter)
        own = self.trained_template if self.trained_template in settings.templates else None
        if own == "chat" and not self.tokenizer.chat_template:
            own = None
        self.template: Template | Literal["none"] = (
            settings.template or own or ("chat" if self.tokenizer.chat_template else "plain")
        )
        limit = context_length(load_config(self.backbone))
        self.room = math.inf if limit is None else limit - settings.max_new_tokens
        if self.room < 1:
            raise ConfigError(
                f"--max_new_tokens: {settings.max_new_tokens}; accepted by this model: less than {limit:,}"
            )
        self.out = Console(highlight=False, soft_wrap=True)
        self.remarks = Console(
            stderr=True,
            highlight=False,
            soft_wrap=True,
            color_system=None if os.environ.get("NO_COLOR") else "auto",
        )

    def _checked(self, others: Sequence[str]) -> BackboneConfig:
        own, problems = self.settings, []
        backbone = BackboneConfig(id=own.backbone or "", dtype=own.dtype)
        if own.backbone is not None:
            problems += [
                f"--backbone: {problem.removeprefix('backbone.id: ')}" for problem in backbone.problems()
            ]
            if own.gates:
                problems.append(
                    "--gates: a backbone without an adapter has no gates; accepted with --adapter"
                )
        else:
            try:
                self.adapter, origin = read_adapter_config(own.adapter)
            except AdapterFileError as error:
                problems.append(f"--adapter: {error}")
            else:
                backbone = BackboneConfig(id=origin["id"] or "", revision=origin["revision"], dtype=own.dtype)
                if origin["id"] is None:
                    problems.append(f"--adapter: {own.adapter} does not say which backbone it belongs to")
                if own.gates and self.adapter.gate.kind == "none":
                    problems.append(
                        f"--gates: {own.adapter} has no gates (gate: none, update: {self.adapter.update}); "
                        "accepted: static, token"
                    )
        problems += others
        if own.max_new_tokens < 1:
            problems.append(f"--max_new_tokens: {own.max_new_tokens}; accepted: an integer of at least 1")
        if not 0 <= own.temperature < math.inf:
            problems.append(
                f"--temperature: {own.temperature}; accepted: 0 for the most likely token, or a number above"
            )
        if own.top_p is not None and not 0 < own.top_p <= 1:
            problems.append(f"--top_p: {own.top_p}; accepted: a probability above 0, up to 1")
        if own.fast is not None and not 0 < own.fast <= 0.5:
            problems.append(f"--fast: {own.fast}; accepted: a gate above 0, up to 0.5")
        if own.fast is not None and own.backbone is not None:
            problems.append("--fast: a backbone without an adapter has no gates; accepted with --adapter")
        for name in ("top_p", "seed"):
            if getattr(own, name) is not None and own.temperature == 0:
                problems.append(
                    f"--{name}: {getattr(own, name)}, and nothing is drawn; accepted with --temperature above 0"
                )
        if problems:
            raise ConfigError(problems)
        return backbone

    def prompt_ids(self, asked: str | Instruction | Chat) -> list[int]:
        """The tokens that the model reads before it answers, as training writes them; with template none, a text as it is.

        Raises ConfigError when the template cannot write what is asked.
        """
        if self.template == "none":
            assert isinstance(asked, str)
            text = asked
        else:
            assert not isinstance(asked, str)
            try:
                text = ConversationPrompts(self.template, self.tokenizer).fitting(asked, sys.maxsize).text
            except (ValueError, TemplateError) as error:
                raise ConfigError(
                    f"--template: {self.template}: {error}; accepted: plain, or turns that it takes"
                ) from error
        return tokenize_prompt(self.tokenizer, text, special_tokens=self.template != "chat")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The weights, on the accelerator where there is one."""
        with device_here() as device:  # weights go there as they are read
            model = load_backbone(self.backbone, device.type)
        if self.adapter is not None:
            load_adapter(model, self.settings.adapter)
        torch.manual_seed(self.settings.seed or 0)
        return model.to(device).eval()  # type: ignore[arg-type]

    def introduce(self) -> None:
        """Say who speaks, how it is asked and how it answers, a line each; loads the weights."""
        own, model = self.settings, self.model
        who = f"{self.backbone.id} in {str(model.dtype).removeprefix('torch.')}"
        if self.adapter is not None:
            who = f"{own.adapter} ({self.adapter.update} × {self.adapter.gate.kind} gate, rank {self.adapter.rank}) on {who}"
        self.remark(who)
        chosen = ""
        if self.trained_template is not None and self.trained_template != self.template:
            chosen = f" (the adapter was trained with {self.trained_template})"
        elif self.adapter is not None and self.trained_template is None and not own.template:
            chosen = " (an adapter answers best in the data.template of its training: --template)"
        drawn = f"temperature {own.temperature:g}" if own.temperature else "the most likely tokens"
        self.remark(f"template {self.template}{chosen}; {drawn}, at most {own.max_new_tokens} an answer")
        if own.fast is not None:
            self.remark(
                f"fast: gates below {own.fast:g} count as 0, above {1 - own.fast:g} as 1; the exact answer may differ"
            )
        gates = [layer.gate for layer in adapted_linears(model).values()]
        if self._watched and self._colours:
            self.remarks.print(Text.assemble((f"mean gate of {len(gates)} modules  ", "dim"), color_scale()))
        elif self._watched:
            self.remark(f"a line a token: its text as JSON, a tab, its mean gate of {len(gates)} modules")
        elif own.gates:
            values = [float(gate.bias.detach().sigmoid()) for gate in gates if isinstance(gate, StaticGate)]
            self.remark(
                f"static gates, the same for every token: mean {sum(values) / len(values):.3f} of {len(values)} modules, "
                f"from {min(values):.3f} to {max(values):.3f}"
            )

    @property
    def _watched(self) -> bool:
        """Whether each token has a gate of its own to show."""
        return self.settings.gates and self.adapter is not None and self.adapter.gate.kind == "token"

    @property
    def _colours(self) -> bool:
        return self.out.color_system is not None and not self.out.no_color

    def answer(self, prompt: list[int]) -> Answer:
        """Say what follows a prompt, then end the line; Ctrl-C ends the answer."""
        own, stopped = self.settings, False
        prompts = collate_prompts(
            [prompt], [0], pad_id=self.tokenizer.pad_token_id, eos_id=self.tokenizer.eos_token_id
        )
        prompts["input_ids"] = prompts["input_ids"].to(self.model.device)
        prompts["attention_mask"] = prompts["attention_mask"].to(self.model.device)
        sampling = Sampling(own.temperature, own.top_p or 1.0) if own.temperature else None
        decided = {} if own.fast is None else {"skip_below": own.fast, "merge_above": 1 - own.fast}
        decoding = DecodingConfig(
            max_new_tokens=own.max_new_tokens + 1, **decided
        )  # the last one is not said: see TextStream
        with ExitStack() as block:
            captured = block.enter_context(capture_gates(self.model)) if self._watched else None
            stream = TextStream(self.tokenizer, self._say, captured)
            try:
                ids = generate(self.model, prompts, decoding, sampling=sampling, streamer=stream)[0].tolist()
            except KeyboardInterrupt:
                stopped = True
                stream.end()
        print(flush=True)  # behind a table of gates, an empty line
        if stopped:
            self.remark("stopped")
        elif len(ids) > own.max_new_tokens and ids[-1] not in end_tokens(self.model, prompts["eos_id"]):
            self.remark(f"cut at --max_new_tokens {own.max_new_tokens}")
        return Answer(stream.text, stopped)

    def _say(self, piece: str, gate: float | None) -> None:
        if gate is None:
            print(printable(piece), end="", flush=True)
        elif self._colours:
            self.out.print(color_by_gate(printable(piece), gate), end="")
        else:
            print(printable(json.dumps(piece, ensure_ascii=False)), f"{gate:.6f}", sep="\t", flush=True)

    def remark(self, line: str) -> None:
        """A line that is no part of an answer."""
        self.remarks.print(Text(printable(line), "dim"))


def printable(text: str) -> str:
    """``text`` without characters that would drive a terminal: an escape becomes ``\\u001b``, as in JSON."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def unusable(text: str) -> str | None:
    """Why a text cannot be asked, or None."""
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError:  # what Python makes of other bytes
        return "is not UTF-8"
    return None


def add_arguments(parser: argparse.ArgumentParser, templates: Sequence[str]) -> None:
    """The flags of both verbs."""
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--adapter", metavar="FOLDER", help="an adapter folder, as beside every checkpoint")
    who.add_argument(
        "--backbone",
        metavar="ID",
        help="instead: the untuned model, by hub id, folder, .gguf file or package:NAME",
    )
    parser.add_argument(
        "--template",
        choices=templates,
        help="how a prompt is written; default: as data.template wrote it in training, or, where the adapter's folder does not "
        "say, chat where the tokenizer has a chat template, else plain",
    )
    parser.set_defaults(templates=templates)
    parser.add_argument(
        "--max_new_tokens", metavar="N", type=int, default=256, help="cut an answer there; default: 256"
    )
    parser.add_argument(
        "--fast",
        metavar="G",
        type=float,
        nargs="?",
        const=0.1,
        help="a token whose gate is below G or above 1 - G reads one weight in place of two, so the answer may differ; G: 0.1",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="draw tokens; default: 0, the most likely ones",
    )
    parser.add_argument(
        "--top_p",
        metavar="P",
        type=float,
        help="draw among the most likely ones of this probability together",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="of what is drawn; default: 0")
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="auto", help="of the backbone; default: auto"
    )
    parser.add_argument(
        "--gates",
        action="store_true",
        help="colour each token by its gate; without colours: a line a token, its text as JSON, a tab, its gate",
    )
