"""A model that answers in the terminal, for `chat` and `generate`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Literal, NamedTuple, cast

import torch
from jinja2 import TemplateError
from rich.text import Text
from transformers import PreTrainedModel

from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.gates import StaticGate
from gatera_lightning.adapters.loading import load_adapter
from gatera_lightning.adapters.lookup import adapted_linears, has_token_gates
from gatera_lightning.adapters.serialization import trained_template
from gatera_lightning.backbone.loading import (
    context_length,
    default_device,
    load_backbone,
    load_config,
    load_tokenizer,
)
from gatera_lightning.cli.draft_arguments import draft_config, template_hint
from gatera_lightning.cli.terminal_arguments import check_arguments
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.datamodules.prompts.conversation_prompts import ConversationPrompts
from gatera_lightning.datamodules.prompts.conversations import Chat, Instruction
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.errors import ConfigError, printable
from gatera_lightning.gate_analysis.capture import capture_gates
from gatera_lightning.gate_analysis.plots.colored_text import color_by_gate, color_scale
from gatera_lightning.generation.decoding import DecodingConfig, Sampling, end_tokens, generate
from gatera_lightning.generation.drafting import Drafter
from gatera_lightning.generation.streaming import TextStream
from gatera_lightning.terminal.printing import SafeConsole


class Answer(NamedTuple):
    """An answer, and whether Ctrl-C stopped it early."""

    text: str
    stopped: bool


class TerminalModel:
    """A backbone, with or without an adapter, that prints answers while it generates them.

    Answers go to standard output, notes about them to standard error.
    """

    def __init__(self, args: argparse.Namespace, problems: Sequence[str] = ()) -> None:
        """Load the tokenizer and the model's config; weights are loaded on first use.

        Args:
            args: Flags of :func:`~gatera_lightning.cli.terminal_arguments.add_arguments`.
            problems: Other problems of the same command line.

        Raises:
            ConfigError: With everything that cannot work.
        """
        self.args = args
        self.backbone, self.adapter, self.folder, self.draft = check_arguments(args, problems)
        self.tokenizer = load_tokenizer(self.backbone)
        self.trained_template = None if self.folder is None else trained_template(self.folder)
        self.template = self._choose_template()
        limit = context_length(load_config(self.backbone))
        self.prompt_limit = math.inf if limit is None else limit - args.max_new_tokens
        """Longest prompt, in tokens, that leaves room for an answer."""
        if self.prompt_limit < 1:
            raise ConfigError(
                f"--max_new_tokens: {args.max_new_tokens}; accepted by this model: less than {limit:,}"
            )
        self._answers = SafeConsole(highlight=False, soft_wrap=True)
        self._notes = SafeConsole(
            stderr=True,
            highlight=False,
            soft_wrap=True,
            color_system=None if os.environ.get("NO_COLOR") else "auto",
        )

    def _choose_template(self) -> Template | Literal["none"]:
        has_chat_template = bool(self.tokenizer.chat_template)
        if self.args.template == "chat" and not has_chat_template:
            raise ConfigError(
                "--template: chat needs a tokenizer with a chat template, and this one has none; accepted: "
                "plain"
            )
        if self.args.template:
            return self.args.template
        usable = self.trained_template in self.args.templates
        if self.trained_template and usable and (self.trained_template != "chat" or has_chat_template):
            return cast(Template, self.trained_template)
        return "chat" if has_chat_template else "plain"

    def prompt_ids(self, prompt: str | Instruction | Chat) -> list[int]:
        """Format a prompt with the template, as in training, and tokenize it.

        Args:
            prompt: A text for the template `none`, which changes nothing; else an instruction or a
                conversation.

        Returns:
            Token ids.

        Raises:
            ConfigError: The template cannot format this prompt.
        """
        if self.template == "none":
            assert isinstance(prompt, str)
            text = prompt
        else:
            assert not isinstance(prompt, str)
            try:
                text = ConversationPrompts(self.template, self.tokenizer).render(prompt, sys.maxsize).text
            except (ValueError, TemplateError) as error:
                raise ConfigError(
                    f"--template: {self.template}: {error}; accepted: plain, or turns that the template "
                    "supports"
                ) from error
        return tokenize_prompt(self.tokenizer, text, special_tokens=self.template != "chat")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in eval mode, on the accelerator if there is one; loading it seeds the sampling."""
        with default_device() as device:  # weights are read straight onto it
            model = load_backbone(self.backbone, device.type)
        if self.folder is not None:
            load_adapter(model, self.folder)
        torch.manual_seed(self.args.seed or 0)
        return model.to(device).eval()  # type: ignore[arg-type]

    @cached_property
    def drafter(self) -> Drafter | None:
        """What decodes with the draft adapter, if one is given."""
        if self.draft is None:
            return None
        return Drafter(self.model, load_draft_adapter(self.model, self.draft), draft_config(self.args))

    def describe(self) -> None:
        """Print notes about the model, the template and the decoding; loads the weights."""
        args, model = self.args, self.model
        name = f"{self.backbone.id} in {str(model.dtype).removeprefix('torch.')}"
        if self.adapter is not None:
            method = f"{self.adapter.update} × {self.adapter.gate.kind} gate, {self.adapter.rank_text}"
            name = f"{self.folder} ({method}) on {name}"
        self.note(name)
        hint = ""
        if self.trained_template is not None and self.trained_template != self.template:
            hint = f" (the adapter was trained with {self.trained_template})"
        elif self.adapter is not None and self.trained_template is None and not args.template:
            hint = " (the adapter does not store its data.template; if it was another, give it as --template)"
        decoding = f"temperature {args.temperature:g}" if args.temperature else "greedy decoding"
        self.note(
            f"template {self.template}{hint}; {decoding}, at most {args.max_new_tokens} tokens per answer"
        )
        if args.fast is not None:
            self.note(
                f"fast: gates below {args.fast:g} count as 0 and above {1 - args.fast:g} as 1; "
                "the answer may differ from the exact one"
            )
        if self.draft is not None and self.drafter is not None:
            hint = template_hint(self.draft, self.template)
            self.note(f"drafts: {self.draft}, in blocks of {self.drafter.config.block} tokens{hint}")
        if args.gates:
            self._describe_gates()

    def _describe_gates(self) -> None:
        gates = [layer.gate for layer in adapted_linears(self.model).values()]
        if self._has_token_gates and self._has_colors:
            self._notes.print(Text.assemble((f"mean gate of {len(gates)} modules  ", "dim"), color_scale()))
        elif self._has_token_gates:
            self.note(f"one line per token: its text as JSON, a tab, its mean gate of {len(gates)} modules")
        else:
            values = [float(gate.constant_value().detach()) for gate in gates if isinstance(gate, StaticGate)]
            self.note(
                "static gates, the same for every token: "
                f"mean {sum(values) / len(values):.3f} of {len(values)} modules, "
                f"from {min(values):.3f} to {max(values):.3f}"
            )

    @property
    def _has_token_gates(self) -> bool:
        """Whether each token has a gate of its own to print."""
        return self.args.gates and has_token_gates(self.model)

    @property
    def _has_colors(self) -> bool:
        return self._answers.color_system is not None and not self._answers.no_color

    def answer(self, prompt: list[int]) -> Answer:
        """Print the continuation of a prompt and end the line; Ctrl-C stops it early.

        Args:
            prompt: Token ids.
        """
        args, stopped = self.args, False
        prompts = collate_prompts(
            [prompt], [0], pad_id=self.tokenizer.pad_token_id, eos_id=self.tokenizer.eos_token_id
        )
        prompts["input_ids"] = prompts["input_ids"].to(self.model.device)
        prompts["attention_mask"] = prompts["attention_mask"].to(self.model.device)
        sampling = Sampling(args.temperature, args.top_p or 1.0) if args.temperature else None
        thresholds = {} if args.fast is None else {"skip_below": args.fast, "merge_above": 1 - args.fast}
        # TextStream never prints the last generated token, so one more is generated. It also tells whether
        # the answer is complete.
        decoding = DecodingConfig(max_new_tokens=args.max_new_tokens + 1, **thresholds)
        with ExitStack() as stack:
            captured = stack.enter_context(capture_gates(self.model)) if self._has_token_gates else None
            stream = TextStream(self.tokenizer, self._print_piece, captured)
            decode = partial(generate, self.model) if self.drafter is None else self.drafter.generate
            was_turned_off = self._drafts_turned_off
            try:
                ids = decode(prompts, decoding, sampling=sampling, streamer=stream)[0].tolist()
            except KeyboardInterrupt:
                stopped = True
                stream.end()
        print(flush=True)  # after a table of gates, this is an empty line
        if stopped:
            self.note("stopped")
        elif len(ids) > args.max_new_tokens and ids[-1] not in end_tokens(self.model, prompts["eos_id"]):
            self.note(f"truncated at --max_new_tokens {args.max_new_tokens}")
        if self.drafter is not None and not was_turned_off:
            if not stopped:
                self.drafter.counts.tokens -= len(ids) > args.max_new_tokens  # it is not part of the answer
            self.note(f"so far {self.drafter.counts}")
            for verdict in self._drafts_turned_off:
                self.note(verdict)
        return Answer(stream.text, stopped)

    @property
    def _drafts_turned_off(self) -> list[str]:
        return [] if self.drafter is None else self.drafter.turned_off

    def _print_piece(self, piece: str, gate: float | None) -> None:
        if gate is None:
            print(printable(piece), end="", flush=True)
        elif self._has_colors:
            self._answers.print(color_by_gate(printable(piece), gate), end="")
        else:
            print(printable(json.dumps(piece, ensure_ascii=False)), f"{gate:.6f}", sep="\t", flush=True)

    def note(self, line: str) -> None:
        """Print a line to standard error."""
        self._notes.print(Text(printable(line), "dim"))
