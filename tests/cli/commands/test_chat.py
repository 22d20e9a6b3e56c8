"""Answers in the terminal: those of a plain greedy loop, whole characters only, each token in the colour of its own gate."""

import io
import itertools
import json
import os
import re
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from tiny_backbone import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import AdapterConfig, generation, inject_adapters, load_adapter, save_adapter
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli import terminal_model as speaking
from gatera_lightning.cli.main import main
from gatera_lightning.gate_analysis.capture import GateCall, GateCapture
from gatera_lightning.generation.streaming import TextStream

PROMPTS = ["What do bees make?", "Tom has 3 boxes.\nHow many"]


def tune(folder, backbone, gate="token", template=None):
    model = load_backbone(BackboneConfig(id=str(backbone), dtype="float32"), "cpu")
    inject_adapters(model, AdapterConfig(gate=gate, rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return str(save_adapter(model, folder, backbone=str(backbone), template=template))


@pytest.fixture(scope="module")
def talkative(tiny_backbone, tmp_path_factory):
    """The tiny backbone with stronger weights, writing various ASCII without an end; and a chat template."""
    folder = tmp_path_factory.mktemp("talkative") / "backbone"
    shutil.copytree(tiny_backbone, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(15)
        for token in range(len(tokenizer)):
            if token in tokenizer.all_special_ids or not tokenizer.decode([token]).isascii():
                model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|eos|>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(talkative, tmp_path_factory):
    return tune(tmp_path_factory.mktemp("tuned") / "adapter", talkative)


@pytest.fixture(scope="module")
def by_hand(talkative, tuned):
    """Ids of a prompt, and what follows greedily, without a cache and without the end."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(talkative).eval(),
        AutoTokenizer.from_pretrained(talkative),
    )
    load_adapter(model, tuned)

    def answer(prompt, tokens):
        ids = list(tokenizer(prompt).input_ids)
        start = len(ids)
        for _ in range(tokens):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                ids.pop()
                break
        return ids, start

    answer.model, answer.tokenizer = model, tokenizer
    answer.text = lambda prompt, tokens: decoded(
        tokenizer, (lambda found: found[0][found[1] :])(answer(prompt, tokens))
    )
    return answer


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def shown(text):
    """Control characters as JSON writes them."""
    return "".join(
        f"\\u{ord(c):04x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def generated(capsys, adapter, *args, prompts=PROMPTS[:1], tokens=40):
    given = [arg for prompt in prompts for arg in ("--prompt", prompt)]
    flags = ["--template", "none", "--max_new_tokens", str(tokens), "--dtype", "float32"]
    status = main(["generate", "--adapter", adapter, *given, *flags, *args])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def talked(monkeypatch, capsys, adapter, lines, *args, tokens=12):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = main(
        ["chat", "--adapter", adapter, "--max_new_tokens", str(tokens), "--dtype", "float32", *args]
    )
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


# --- the stream ---


def test_characters_are_whole_and_every_piece_has_the_gate_of_its_tokens():
    tokenizer = tiny_tokenizer()
    text = "ab é🐝c"
    ids = [i for c in text for i in tokenizer(c).input_ids] + [
        tokenizer.bos_token_id,
        *tokenizer("d").input_ids,
    ]
    starts = np.cumsum([0] + [len(tokenizer(c).input_ids) for c in text])
    gates = torch.rand(
        3, len(ids) + 1, generator=torch.Generator().manual_seed(0)
    )  # of the prompt's last token first
    captured, pieces = GateCapture(), []
    stream = TextStream(tokenizer, lambda *piece: pieces.append(piece), captured)
    stream.put(torch.tensor([[5, 6, 7]]))
    for number, token in enumerate([*ids, tokenizer.eos_token_id]):
        z = gates[:, None, number : number + 1]
        captured.calls.append(
            GateCall("decoding", torch.tensor([[0]]), torch.ones(1, 1).bool(), torch.zeros(1, 1), z)
        )
        stream.put(torch.tensor([token]))
    stream.end()
    assert [piece for piece, _ in pieces] == [*text, "d"]  # not the special token, nor the end
    means = gates.mean(0)[1:]
    expected = [means[a:b].mean() for a, b in itertools.pairwise(starts)] + [means[-1]]
    assert [gate for _, gate in pieces] == pytest.approx([float(gate) for gate in expected])
    assert stream.text == text + "d"


def test_bytes_that_never_become_a_character_come_last():
    tokenizer, pieces = tiny_tokenizer(), []
    stream = TextStream(tokenizer, lambda piece, gate: pieces.append(piece))
    for token in [[1], *tokenizer("a🐝").input_ids[:3], 1]:
        stream.put(torch.tensor(token).reshape(-1))
    assert pieces == ["a"]
    stream.end()
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_nothing_generated_drives_the_terminal():
    assert speaking.printable("a\tb\nc") == "a\tb\nc"
    assert (
        speaking.printable("\x1b[31m\r\x07\x7f\x9b\u202e é🐝")
        == r"\u001b[31m\u000d\u0007\u007f\u009b\u202e é🐝"
    )


# --- generate ---


def test_answers_are_those_of_a_plain_loop_and_nothing_else_is_printed(capsys, tuned, by_hand):
    out, err = generated(capsys, tuned, prompts=PROMPTS)
    assert out == "".join(shown(by_hand.text(prompt, 40)) + "\n" for prompt in PROMPTS)
    assert len(out) > 40
    assert "hira × token gate, rank 2" in err


def test_what_is_cut_is_said_and_an_answer_that_ends_there_is_not_cut(
    capsys, talkative, tuned, by_hand, tmp_path
):
    ids, start = by_hand(PROMPTS[0], 40)
    cut = next(n for n in range(5, 40) if ids[start + n] not in ids[start : start + n])
    out, err = generated(capsys, tuned, tokens=cut)
    assert out == shown(by_hand.text(PROMPTS[0], cut)) + "\n"
    assert f"cut at --max_new_tokens {cut}" in err
    other = shutil.copytree(talkative, tmp_path / "ends")
    settings = json.loads((other / "generation_config.json").read_text())
    settings["eos_token_id"] = [settings["eos_token_id"], ids[start + cut]]  # the next token ends an answer
    (other / "generation_config.json").write_text(json.dumps(settings))
    again = shutil.copytree(tuned, tmp_path / "adapter")
    description = (again / "adapter_config.json").read_text().replace(str(talkative), str(other))
    (again / "adapter_config.json").write_text(description)
    same, err = generated(capsys, str(again), tokens=cut)
    assert same == out
    assert "cut at" not in err


def test_gates_are_those_of_the_whole_text_read_at_once(capsys, tuned, by_hand):
    out, err = generated(capsys, tuned, "--gates", tokens=40)
    assert "a line a token" in err
    rows = [line.split("\t") for line in out.splitlines() if line]
    pieces = [(json.loads(piece), float(gate)) for piece, gate in rows]
    ids, start = by_hand(PROMPTS[0], 40)
    tokenizer, text = by_hand.tokenizer, decoded(by_hand.tokenizer, ids[start:])
    assert "".join(piece for piece, _ in pieces) == text
    expected = []
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args: expected.append(
                torch.sigmoid(args[0][0] @ layer.gate.weight + layer.gate.bias)
            )
        )
        for layer in adapted_linears(by_hand.model).values()
    ]
    with torch.no_grad():
        by_hand.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    means = torch.stack(expected).mean(0)[start:]
    prefixes = [decoded(tokenizer, ids[start : start + n]) for n in range(len(ids) - start + 1)]
    lengths = [
        len(prefix) if text.startswith(prefix) else -1 for prefix in prefixes
    ]  # half a character is none
    place = 0
    for piece, gate in pieces:
        before, place = place, place + len(piece)
        tokens = range(max(n for n, length in enumerate(lengths) if length == before), lengths.index(place))
        # this backbone is loud, and enlarges what two ways to read a text round apart
        assert gate == pytest.approx(float(means[list(tokens)].mean()), abs=1e-5), piece
    assert len(pieces) == 40
    assert np.ptp(means.numpy()) > 0.05


def test_colours_are_the_scale_of_the_heatmaps(capsys, tuned, monkeypatch):
    table = [line.split("\t") for line in generated(capsys, tuned, "--gates")[0].splitlines() if line]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err = generated(capsys, tuned, "--gates")
    assert "mean gate of 10 modules" in err
    assert " 0.0 " in err
    coloured = re.findall(r"\x1b\[38;2;\d+;\d+;\d+;48;2;(\d+);(\d+);(\d+)m([^\x1b]*)\x1b\[0m", out)
    expected = []
    for piece, gate in table:
        colour = [str(round(255 * part)) for part in colormaps["cividis"](float(gate))[:3]]
        texts = re.split("(?=↵)", shown(json.loads(piece)).replace("\n", "↵"))
        expected += [(*colour, text.expandtabs()) for text in texts if text]  # as a console prints tabs
    assert [found for found in coloured if found[3]] == expected
    monkeypatch.setenv("NO_COLOR", "1")
    out, err = generated(capsys, tuned, "--gates")
    assert [line.split("\t") for line in out.splitlines() if line] == table
    assert "\x1b" not in out + err


def test_fast_answers_are_those_of_hard_gates(capsys, tuned, talkative, monkeypatch):
    exact, _ = generated(capsys, tuned)
    seen = []
    prepared = generation.prepared_for_inference
    monkeypatch.setattr(
        generation,
        "prepared_for_inference",
        lambda model, **thresholds: seen.append(thresholds) or prepared(model, **thresholds),
    )
    assert generated(capsys, tuned)[0] == exact
    _, err = generated(capsys, tuned, "--fast")
    assert "fast: gates below 0.1 count as 0, above 0.9 as 1; the exact answer may differ" in err
    assert generated(capsys, tuned, "--fast", "1e-9")[0] == exact  # no gate of this model is that decided
    assert [list(thresholds.values()) for thresholds in seen] == [[0.0, 1.0], [0.1, 0.9], [1e-9, 1 - 1e-9]]


@pytest.mark.parametrize("gate", ["0", "0.6", "nan"])
def test_a_gate_that_cannot_be_fast_is_refused(capsys, tuned, gate):
    assert main(["generate", "--adapter", tuned, "--prompt", "a", "--fast", gate]) == 2
    assert f"--fast: {float(gate)}; accepted: a gate above 0, up to 0.5" in capsys.readouterr().err


def test_fast_without_an_adapter_is_refused(capsys, talkative):
    assert main(["generate", "--backbone", str(talkative), "--prompt", "a", "--fast", "0.1"]) == 2
    assert "--fast: a backbone without an adapter has no gates" in capsys.readouterr().err


def test_a_static_gate_is_told_once_and_no_gate_is_refused(capsys, talkative, tmp_path):
    adapter = tune(tmp_path / "static", talkative, "static")
    out, err = generated(capsys, adapter, "--gates", tokens=5)
    model = AutoModelForCausalLM.from_pretrained(talkative)
    load_adapter(model, adapter)
    values = [float(torch.sigmoid(layer.gate.bias.detach())) for layer in adapted_linears(model).values()]
    assert f"mean {np.mean(values):.3f} of 10 modules, from {min(values):.3f} to {max(values):.3f}" in err
    assert "\t" not in out
    adapter = tune(tmp_path / "none", talkative, "none")
    assert main(["generate", "--adapter", adapter, "--prompt", "a", "--gates"]) == 2
    assert (
        f"--gates: {adapter} has no gates (gate: none, update: hira); accepted: static, token"
        in capsys.readouterr().err
    )


def test_the_untuned_model_answers_too(capsys, talkative):
    flags = ["--template", "none", "--max_new_tokens", "8", "--dtype", "float32"]
    assert main(["generate", "--backbone", str(talkative), "--prompt", PROMPTS[0], *flags]) == 0
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(talkative),
        AutoTokenizer.from_pretrained(talkative),
    )
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert capsys.readouterr().out == shown(decoded(tokenizer, answer)) + "\n"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (None, "[user] Why?<|eos|>[assistant]"),
        ("chat", "[user] Why?<|eos|>[assistant]"),
        ("plain", "Question: Why?\nAnswer:"),
        ("none", "Why?"),
    ],
)
def test_a_prompt_is_written_as_in_training(capsys, monkeypatch, tuned, by_hand, template, prompt):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
    chosen = ["--template", template] if template else []
    flags = ["--max_new_tokens", "8", "--dtype", "float32", *chosen]
    assert main(["generate", "--adapter", tuned, "--prompt", "-", *flags]) == 0
    out, err = capsys.readouterr()
    assert out == shown(by_hand.text(prompt, 8)) + "\n"
    assert f"template {template or 'chat'}" in err
    assert ("--template" in err) == (template is None)


@pytest.mark.parametrize(
    ("trained", "verb", "given", "told"),
    [
        ("plain", "generate", None, "template plain; "),
        ("alpaca", "generate", None, "template alpaca; "),
        ("plain", "generate", "chat", "template chat (the adapter was trained with plain); "),
        ("plain", "chat", None, "template plain; "),
        ("alpaca", "chat", None, "template chat (the adapter was trained with alpaca); "),
    ],
)
def test_an_adapter_is_asked_as_it_was_trained(
    capsys, monkeypatch, talkative, tmp_path, trained, verb, given, told
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
    adapter = tune(tmp_path / "adapter", talkative, template=trained)
    flags = ["--max_new_tokens", "2", "--dtype", "float32", *(["--template", given] if given else [])]
    assert (
        main([verb, "--adapter", adapter, *(["--prompt", "Why?"] if verb == "generate" else []), *flags]) == 0
    )
    assert told in capsys.readouterr().err


def test_draws_depend_on_the_seed_alone(capsys, tuned):
    def drawn(*flags):
        return generated(capsys, tuned, "--temperature", "2", *flags, tokens=10)[0]

    assert drawn() == drawn("--seed", "0") != drawn("--seed", "1")
    assert drawn("--top_p", "1e-6") == generated(capsys, tuned, tokens=10)[0] != drawn()


# --- chat ---


def test_earlier_turns_are_part_of_a_prompt_until_they_are_forgotten(capsys, monkeypatch, tuned, by_hand):
    lines = ["Why?", "", "And how?", "/nonsense", "/reset", "And how?", "/quit", "Why?"]
    out, err = talked(monkeypatch, capsys, tuned, lines, "--template", "plain")
    first = by_hand.text("User: Why?\nAssistant:", 12)
    second = by_hand.text(f"User: Why?\nAssistant: {first.strip()}<|eos|>\nUser: And how?\nAssistant:", 12)
    alone = by_hand.text("User: And how?\nAssistant:", 12)
    assert out == "".join(shown(text) + "\n" for text in (first, second, alone))
    assert second != alone
    assert "/nonsense is no command: /reset forgets" in err
    assert "forgotten" in err


def test_the_oldest_turns_make_room_and_a_message_that_is_too_long_is_refused(
    capsys, monkeypatch, tuned, by_hand
):
    lines = ["a " * 20, "b " * 20, "c " * 200, "d?"]
    out, err = talked(
        monkeypatch, capsys, tuned, lines, "--template", "plain", tokens=452
    )  # 60 tokens are left
    assert (
        "the oldest 1 of 1 turns are forgotten, to fit into the 60 tokens that --max_new_tokens 452 leaves"
        in err
    )
    assert re.search(r"that has \d{3} tokens, more than the 60 tokens", err)
    expected = [
        by_hand.text(f"User: {line.strip()}\nAssistant:", 452) for line in (lines[0], lines[1], lines[3])
    ]
    assert out == "".join(shown(text) + "\n" for text in expected)


def test_at_a_terminal_control_c_says_how_to_end_and_control_d_ends(capsys, monkeypatch, tuned, by_hand):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    typed = iter([KeyboardInterrupt, "Why?", EOFError, "How?"])

    def read():  # no prompt: standard output is no terminal
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert (
        main(
            ["chat", "--adapter", tuned, "--max_new_tokens", "6", "--dtype", "float32", "--template", "plain"]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == shown(by_hand.text("User: Why?\nAssistant:", 6)) + "\n"
    assert "> " in err
    assert err.count("/quit or Ctrl-D ends") == 2
    assert next(typed) == "How?"


def test_an_answer_can_be_stopped(capsys, monkeypatch, tuned, by_hand):
    """Interrupted behind the first piece of the second answer, which is said, and part of the next prompt."""
    say, said = speaking.Speaker._say, []
    stop_at = 0

    def interrupted(self, piece, gate):
        say(self, piece, gate)
        said.append(piece)
        if len(said) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(speaking.Speaker, "_say", interrupted)
    flags = ["--template", "plain"]
    whole, err = talked(monkeypatch, capsys, tuned, ["Why?", "How?"], *flags)
    assert "stopped" not in err
    first = by_hand.text("User: Why?\nAssistant:", 12)
    stop_at = list(itertools.accumulate(said)).index(first) + 2
    begun = said[stop_at - 1]
    said.clear()
    out, err = talked(monkeypatch, capsys, tuned, ["Why?", "How?", "So?"], *flags)
    assert "stopped" in err
    before = f"User: Why?\nAssistant: {first.strip()}<|eos|>\nUser: How?\nAssistant: {begun.strip()}<|eos|>\nUser: So?\nAssistant:"
    assert out == "".join(shown(text) + "\n" for text in (first, begun, by_hand.text(before, 12)))
    assert len(out) != len(whole)
    stop_at = 2
    said.clear()
    with pytest.raises(SystemExit) as caught:
        generated(capsys, tuned)
    assert caught.value.code == 130
    assert capsys.readouterr().out == shown("".join(said)) + "\n"


def test_a_closed_pipe_ends_both_verbs_without_a_word(capsys, monkeypatch, tuned):
    flags = ["--adapter", tuned, "--max_new_tokens", "6", "--dtype", "float32", "--template", "plain"]
    for verb in (["generate", "--prompt", "Why?"], ["chat"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as nobody:
            monkeypatch.setattr(sys, "stdout", nobody)
            with pytest.raises(SystemExit) as caught:
                main([*verb, *flags])
            assert caught.value.code == 141
        assert "Traceback" not in capsys.readouterr().err


# --- problems ---


@pytest.fixture
def without_weights(monkeypatch):
    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(speaking, "load_backbone", load)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prompt", " "], "--prompt: ' ' is empty; accepted: a text"),
        (["--prompt", "a\udcff"], r"--prompt: 'a\udcff' is not UTF-8; accepted: a text"),
        (["--prompt", "word " * 300], "accepted by this model with --max_new_tokens 256: at most 256"),
        (["--max_new_tokens", "0"], "--max_new_tokens: 0; accepted: an integer of at least 1"),
        (["--max_new_tokens", "512"], "--max_new_tokens: 512; accepted by this model: less than 512"),
        (
            ["--temperature", "-1"],
            "--temperature: -1.0; accepted: 0 for the most likely token, or a number above",
        ),
        (["--temperature", "1", "--top_p", "0"], "--top_p: 0.0; accepted: a probability above 0, up to 1"),
        (["--top_p", "0.9"], "--top_p: 0.9, and nothing is drawn; accepted with --temperature above 0"),
        (["--seed", "3"], "--seed: 3, and nothing is drawn; accepted with --temperature above 0"),
    ],
)
def test_what_cannot_work_is_said_before_weights_are_loaded(capsys, tuned, without_weights, args, said):
    assert main(["generate", "--adapter", tuned, "--prompt", "Why?", *args]) == 2
    assert said in capsys.readouterr().err


def test_problems_are_named_together(capsys, without_weights, tmp_path):
    args = ["--adapter", str(tmp_path), "--prompt", "", "--max_new_tokens", "-1"]
    assert main(["generate", *args]) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said
    assert f"--adapter: {tmp_path}: no adapter here" in said
    assert main(["chat", "--backbone", "/nowhere", "--gates"]) == 2
    said = capsys.readouterr().err
    assert "--backbone: '/nowhere' is not an existing folder" in said
    assert "--gates: a backbone without an adapter has no gates" in said


@pytest.fixture
def refusing(talkative, tmp_path):
    """``refusing(condition)``: the backbone, with a chat template that raises where the condition on ``messages`` holds."""

    def with_template(condition):
        folder = shutil.copytree(talkative, tmp_path / "refusing")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        refusal = "{% if " + condition + " %}{{ raise_exception('one turn only') }}{% endif %}"
        tokenizer.chat_template = refusal + tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        return str(folder)

    return with_template


@pytest.mark.parametrize("verb", [["generate", "--prompt", "Why?"], ["chat"]])
def test_a_chat_template_that_refuses_every_turn_is_said(capsys, without_weights, refusing, verb):
    assert main([*verb, "--backbone", refusing("true"), "--template", "chat"]) == 2
    err = capsys.readouterr().err
    assert (
        "--template: chat: the tokenizer's chat template refuses these turns: one turn only; accepted: plain"
        in err
    )


def test_a_chat_goes_on_after_a_turn_that_its_template_refuses(capsys, monkeypatch, refusing, talkative):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\nHow?\n/reset\nHow?\n"))
    flags = ["--max_new_tokens", "4", "--dtype", "float32"]
    assert main(["chat", "--backbone", refusing("messages|length > 2"), *flags]) == 0
    out, err = capsys.readouterr()
    assert (
        err.count(
            "not asked: --template: chat: the tokenizer's chat template refuses these turns: one turn only"
        )
        == 1
    )
    for prompt in ("Why?", "How?"):
        assert main(["generate", "--backbone", str(talkative), "--prompt", prompt, *flags]) == 0
    assert out == capsys.readouterr().out


def test_a_chat_template_that_is_not_there_is_said(capsys, without_weights, tiny_backbone):
    assert main(["chat", "--backbone", str(tiny_backbone), "--template", "chat"]) == 2
    assert (
        "--template: chat needs a tokenizer with a chat template, and this one has none"
        in capsys.readouterr().err
    )
