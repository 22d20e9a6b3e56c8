"""``chat``: a conversation whose earlier turns are part of the prompt."""

import io
import itertools
import re
import sys

import pytest
from terminal_models import escape

from gatera_lightning.cli.main import main
from gatera_lightning.cli.terminal_model import TerminalModel


@pytest.fixture
def chat(monkeypatch, capsys, adapter):
    """``chat(lines, *flags)``: standard output and standard error after these lines of input."""

    def run(lines, *flags, tokens=12):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        own = ["--max_new_tokens", str(tokens), "--dtype", "float32"]
        status = main(["chat", "--adapter", adapter, *own, *flags])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out, err

    return run


def test_earlier_turns_are_part_of_the_prompt_until_reset(chat, reference):
    lines = ["Why?", "", "And how?", "/nonsense", "/reset", "And how?", "/quit", "Why?"]
    out, err = chat(lines, "--template", "plain")
    first = reference.text("User: Why?\nAssistant:", 12)
    second = reference.text(f"User: Why?\nAssistant: {first.strip()}<|eos|>\nUser: And how?\nAssistant:", 12)
    alone = reference.text("User: And how?\nAssistant:", 12)
    assert out == "".join(escape(text) + "\n" for text in (first, second, alone))
    assert second != alone
    assert "/nonsense is not a command: /reset clears" in err
    assert "conversation cleared" in err


def test_oldest_turns_are_dropped_and_a_long_message_is_rejected(chat, reference):
    lines = ["a " * 20, "b " * 20, "c " * 200, "d?"]
    out, err = chat(lines, "--template", "plain", tokens=452)  # leaves 60 tokens for the prompt
    room = "the 60 tokens of this model's context that --max_new_tokens 452 leaves for the prompt"
    assert f"dropped the oldest 1 of 1 turns to fit into {room}" in err
    assert re.search(rf"not answered: the message has \d{{3}} tokens, more than {room}", err)
    prompts = [f"User: {line.strip()}\nAssistant:" for line in (lines[0], lines[1], lines[3])]
    assert out == "".join(escape(reference.text(prompt, 452)) + "\n" for prompt in prompts)


def test_terminal_explains_ctrl_c_and_exits_on_ctrl_d(capsys, monkeypatch, adapter, reference):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    typed = iter([KeyboardInterrupt, "Why?", EOFError, "How?"])

    def read():  # without a prompt, because standard output is not a terminal
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Terminal())
    flags = ["--max_new_tokens", "6", "--dtype", "float32", "--template", "plain"]
    assert main(["chat", "--adapter", adapter, *flags]) == 0
    out, err = capsys.readouterr()
    assert out == escape(reference.text("User: Why?\nAssistant:", 6)) + "\n"
    assert "> " in err
    assert err.count("/quit or Ctrl-D exits") == 2
    assert next(typed) == "How?"


def test_stopped_answer_is_part_of_the_next_prompt(chat, monkeypatch, reference):
    """The second answer is interrupted after its first piece."""
    print_piece, printed = TerminalModel._print_piece, []
    stop_at = 0

    def interrupt(self, piece, gate):
        print_piece(self, piece, gate)
        printed.append(piece)
        if len(printed) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(TerminalModel, "_print_piece", interrupt)
    complete, err = chat(["Why?", "How?"], "--template", "plain")
    assert "stopped" not in err
    first = reference.text("User: Why?\nAssistant:", 12)
    stop_at = list(itertools.accumulate(printed)).index(first) + 2
    begun = printed[stop_at - 1]
    printed.clear()
    out, err = chat(["Why?", "How?", "So?"], "--template", "plain")
    assert "stopped" in err
    turns = [("Why?", first), ("How?", begun)]
    history = "".join(f"User: {asked}\nAssistant: {answer.strip()}<|eos|>\n" for asked, answer in turns)
    last = reference.text(f"{history}User: So?\nAssistant:", 12)
    assert out == "".join(escape(text) + "\n" for text in (first, begun, last))
    assert len(out) != len(complete)


@pytest.mark.parametrize("command", [["generate", "--prompt", "Why?"], ["chat"]], ids=lambda c: c[0])
def test_template_that_refuses_every_turn_is_reported(problems, no_weights, refusing, command):
    (problem,) = problems(*command, "--backbone", refusing("true"), "--template", "chat")
    assert problem.startswith("--template: chat: ")
    assert "one turn only" in problem
    assert "accepted: plain" in problem


def test_chat_continues_after_a_turn_that_the_template_refuses(capsys, monkeypatch, refusing, talkative):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\nHow?\n/reset\nHow?\n"))
    flags = ["--max_new_tokens", "4", "--dtype", "float32"]
    assert main(["chat", "--backbone", refusing("messages|length > 2"), *flags]) == 0
    out, err = capsys.readouterr()
    assert len(re.findall(r"not answered: --template: chat: .*one turn only", err)) == 1
    for prompt in ("Why?", "How?"):
        assert main(["generate", "--backbone", str(talkative), "--prompt", prompt, *flags]) == 0
    assert out == capsys.readouterr().out


def test_missing_chat_template_is_reported(problems, no_weights, tiny_backbone):
    (problem,) = problems("chat", "--backbone", str(tiny_backbone), "--template", "chat")
    assert problem.startswith(
        "--template: chat needs a tokenizer with a chat template, and this one has none"
    )


def test_missing_backbone_is_reported(problems, no_weights):
    first, second = problems("chat", "--backbone", "/nowhere", "--gates")
    assert first.startswith("--backbone: '/nowhere' ")
    assert second.startswith("--gates: a backbone without an adapter has no gates")
