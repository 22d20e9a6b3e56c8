"""``generate``: answers equal to plain greedy decoding, and each token with its own gate."""

import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from gate_reports import save_random_adapter
from matplotlib import colormaps
from terminal_models import decode, escape
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import load_adapter
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.cli.main import main
from gatera_lightning.cli.terminal_model import TerminalModel
from gatera_lightning.generation import decoding

PROMPTS = ["What do bees make?", "Tom has 3 boxes.\nHow many"]


@pytest.fixture
def generate(capsys):
    """``generate(adapter, *flags)``: standard output and standard error."""

    def run(adapter, *flags, prompts=PROMPTS[:1], tokens=40):
        given = [arg for prompt in prompts for arg in ("--prompt", prompt)]
        own = ["--template", "none", "--max_new_tokens", str(tokens), "--dtype", "float32"]
        status = main(["generate", "--adapter", adapter, *given, *own, *flags])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out, err

    return run


# --- answers ---


def test_generate_prints_greedy_answers_and_nothing_else(generate, adapter, reference):
    out, err = generate(adapter, prompts=PROMPTS)
    assert out == "".join(escape(reference.text(prompt, 40)) + "\n" for prompt in PROMPTS)
    assert len(out) > 40
    assert "hira × token gate, rank 2" in err


def test_truncated_answer_is_noted(generate, talkative, adapter, reference, tmp_path):
    ids, start = reference.ids(PROMPTS[0], 40)
    limit = next(n for n in range(5, 40) if ids[start + n] not in ids[start : start + n])
    out, err = generate(adapter, tokens=limit)
    assert out == escape(reference.text(PROMPTS[0], limit)) + "\n"
    assert f"truncated at --max_new_tokens {limit}" in err
    ending = shutil.copytree(talkative, tmp_path / "ending")
    settings = json.loads((ending / "generation_config.json").read_text())
    settings["eos_token_id"] = [
        settings["eos_token_id"],
        ids[start + limit],
    ]  # the next token ends the answer
    (ending / "generation_config.json").write_text(json.dumps(settings))
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = (copy / "adapter_config.json").read_text().replace(str(talkative), str(ending))
    (copy / "adapter_config.json").write_text(config)
    same, err = generate(str(copy), tokens=limit)
    assert same == out
    assert "truncated at" not in err


def test_backbone_answers_without_adapter(capsys, talkative):
    flags = ["--template", "none", "--max_new_tokens", "8", "--dtype", "float32"]
    assert main(["generate", "--backbone", str(talkative), "--prompt", PROMPTS[0], *flags]) == 0
    model = AutoModelForCausalLM.from_pretrained(talkative)
    tokenizer = AutoTokenizer.from_pretrained(talkative)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert capsys.readouterr().out == escape(decode(tokenizer, answer)) + "\n"


def test_samples_depend_on_the_seed_alone(generate, adapter):
    def sample(*flags):
        return generate(adapter, "--temperature", "2", *flags, tokens=10)[0]

    assert sample() == sample("--seed", "0") != sample("--seed", "1")
    assert sample("--top_p", "1e-6") == generate(adapter, tokens=10)[0] != sample()


def test_fast_decoding_passes_its_thresholds(generate, adapter, monkeypatch):
    exact, _ = generate(adapter)
    seen, prepare = [], decoding.prepared_for_inference
    monkeypatch.setattr(
        decoding,
        "prepared_for_inference",
        lambda model, **thresholds: seen.append(thresholds) or prepare(model, **thresholds),
    )
    assert generate(adapter)[0] == exact
    _, err = generate(adapter, "--fast")
    assert (
        "fast: gates below 0.1 count as 0 and above 0.9 as 1; the answer may differ from the exact one" in err
    )
    assert generate(adapter, "--fast", "1e-9")[0] == exact  # no gate of this model is that saturated
    assert [list(thresholds.values()) for thresholds in seen] == [[0.0, 1.0], [0.1, 0.9], [1e-9, 1 - 1e-9]]


# --- templates ---


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (None, "[user] Why?<|eos|>[assistant]"),
        ("chat", "[user] Why?<|eos|>[assistant]"),
        ("plain", "Question: Why?\nAnswer:"),
        ("none", "Why?"),
    ],
)
def test_prompt_from_stdin_is_formatted_as_in_training(
    capsys, monkeypatch, adapter, reference, template, prompt
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
    flags = ["--max_new_tokens", "8", "--dtype", "float32", *(["--template", template] if template else [])]
    assert main(["generate", "--adapter", adapter, "--prompt", "-", *flags]) == 0
    out, err = capsys.readouterr()
    assert out == escape(reference.text(prompt, 8)) + "\n"
    assert f"template {template or 'chat'}" in err
    assert ("give it as --template" in err) == (template is None)


@pytest.mark.parametrize(
    ("trained", "subcommand", "given", "note"),
    [
        ("plain", "generate", None, "template plain; "),
        ("alpaca", "generate", None, "template alpaca; "),
        ("plain", "generate", "chat", "template chat (the adapter was trained with plain); "),
        ("plain", "chat", None, "template plain; "),
        ("alpaca", "chat", None, "template chat (the adapter was trained with alpaca); "),
    ],
)
def test_default_template_is_that_of_training(
    capsys, monkeypatch, talkative, tmp_path, trained, subcommand, given, note
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
    adapter = str(tmp_path / "adapter")
    save_random_adapter(adapter, talkative, template=trained)
    flags = ["--max_new_tokens", "2", "--dtype", "float32", *(["--template", given] if given else [])]
    prompt = ["--prompt", "Why?"] if subcommand == "generate" else []
    assert main([subcommand, "--adapter", adapter, *prompt, *flags]) == 0
    assert note in capsys.readouterr().err


# --- gates ---


def test_gates_are_those_of_reading_the_whole_text(generate, adapter, reference):
    out, err = generate(adapter, "--gates", tokens=40)
    assert "one line per token" in err
    rows = [line.split("\t") for line in out.splitlines() if line]
    pieces = [(json.loads(piece), float(gate)) for piece, gate in rows]
    ids, start = reference.ids(PROMPTS[0], 40)
    tokenizer, text = reference.tokenizer, decode(reference.tokenizer, ids[start:])
    assert "".join(piece for piece, _ in pieces) == text
    gates = []

    def record(layer, args):
        gates.append(torch.sigmoid(args[0][0] @ layer.gate.weight + layer.gate.bias))

    handles = [layer.register_forward_pre_hook(record) for layer in adapted_linears(reference.model).values()]
    with torch.no_grad():
        reference.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    means = torch.stack(gates).mean(0)[start:]
    prefixes = [decode(tokenizer, ids[start : start + n]) for n in range(len(ids) - start + 1)]
    # A prefix that ends within a character is not a prefix of the text.
    lengths = [len(prefix) if text.startswith(prefix) else -1 for prefix in prefixes]
    position = 0
    for piece, gate in pieces:
        before, position = position, position + len(piece)
        tokens = range(
            max(n for n, length in enumerate(lengths) if length == before), lengths.index(position)
        )
        # This backbone's large weights amplify the rounding differences between two ways to read a text.
        assert gate == pytest.approx(float(means[list(tokens)].mean()), abs=1e-5), piece
    assert len(pieces) == 40
    assert np.ptp(means.numpy()) > 0.05


def test_gates_color_tokens_as_heatmaps_do(generate, adapter, monkeypatch):
    table = [line.split("\t") for line in generate(adapter, "--gates")[0].splitlines() if line]
    for name, value in (("FORCE_COLOR", "1"), ("COLORTERM", "truecolor"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    out, err = generate(adapter, "--gates")
    assert "mean gate of 10 modules" in err
    assert " 0.0 " in err
    colored = re.findall(r"\x1b\[38;2;\d+;\d+;\d+;48;2;(\d+);(\d+);(\d+)m([^\x1b]*)\x1b\[0m", out)
    expected = []
    for piece, gate in table:
        color = [str(round(255 * part)) for part in colormaps["cividis"](float(gate))[:3]]
        texts = re.split("(?=↵)", escape(json.loads(piece)).replace("\n", "↵"))
        expected += [(*color, text.expandtabs()) for text in texts if text]  # rich expands tabs
    assert [found for found in colored if found[3]] == expected
    monkeypatch.setenv("NO_COLOR", "1")
    out, err = generate(adapter, "--gates")
    assert [line.split("\t") for line in out.splitlines() if line] == table
    assert "\x1b" not in out + err


def test_static_gates_are_described_once(generate, talkative, tmp_path):
    adapter = str(tmp_path / "static")
    save_random_adapter(adapter, talkative, "static")
    out, err = generate(adapter, "--gates", tokens=5)
    model = AutoModelForCausalLM.from_pretrained(talkative)
    load_adapter(model, adapter)
    values = [float(torch.sigmoid(layer.gate.bias.detach())) for layer in adapted_linears(model).values()]
    assert f"mean {np.mean(values):.3f} of 10 modules, from {min(values):.3f} to {max(values):.3f}" in err
    assert "\t" not in out


def test_hard_gates_are_printed_for_each_token(generate, talkative, tmp_path):
    adapter = str(tmp_path / "hard")
    save_random_adapter(adapter, talkative, "hard")
    out, err = generate(adapter, "--gates", tokens=5)
    assert "its mean gate of 10 modules" in err
    assert all(0 <= float(line.split("\t")[1]) <= 1 for line in out.splitlines() if line)


# --- interruptions ---


def test_ctrl_c_exits_with_130(generate, adapter, capsys, monkeypatch):
    print_piece, printed = TerminalModel._print_piece, []

    def interrupt(self, piece, gate):
        print_piece(self, piece, gate)
        printed.append(piece)
        if len(printed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TerminalModel, "_print_piece", interrupt)
    with pytest.raises(SystemExit) as caught:
        generate(adapter)
    assert caught.value.code == 130
    assert capsys.readouterr().out == escape("".join(printed)) + "\n"


@pytest.mark.parametrize("command", [["generate", "--prompt", "Why?"], ["chat"]], ids=lambda c: c[0])
def test_closed_pipe_exits_silently_with_141(capsys, monkeypatch, adapter, command):
    flags = ["--adapter", adapter, "--max_new_tokens", "6", "--dtype", "float32", "--template", "plain"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main([*command, *flags]) == 141
    assert "Traceback" not in capsys.readouterr().err


# --- problems ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", " "], "--prompt: ' ' is empty; accepted: a text"),
        (["--prompt", "a\udcff"], r"--prompt: 'a\udcff' is not UTF-8; accepted: a text"),
        (["--prompt", "word " * 300], "accepted by this model with --max_new_tokens 256: at most 256"),
        (["--max_new_tokens", "0"], "--max_new_tokens: 0; accepted: an integer of at least 1"),
        (["--max_new_tokens", "512"], "--max_new_tokens: 512; accepted by this model: less than 512"),
        (
            ["--temperature", "-1"],
            "--temperature: -1.0; accepted: 0 for greedy decoding, or a number above 0",
        ),
        (["--temperature", "1", "--top_p", "0"], "--top_p: 0.0; accepted: a probability above 0, up to 1"),
        (
            ["--top_p", "0.9"],
            "--top_p: 0.9, but greedy decoding does not sample; accepted with --temperature above 0",
        ),
        (
            ["--seed", "3"],
            "--seed: 3, but greedy decoding does not sample; accepted with --temperature above 0",
        ),
        (["--fast", "0"], "--fast: 0.0; accepted: a gate value above 0, up to 0.5"),
        (["--fast", "0.6"], "--fast: 0.6; accepted: a gate value above 0, up to 0.5"),
        (["--fast", "nan"], "--fast: nan; accepted: a gate value above 0, up to 0.5"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_generate_rejects_invalid_flags_before_loading_weights(problems, adapter, no_weights, flags, message):
    (problem,) = problems("generate", "--adapter", adapter, "--prompt", "Why?", *flags)
    assert problem.endswith(message)


def test_generate_reports_all_problems_at_once(problems, no_weights, tmp_path):
    first, *others = problems(
        "generate", "--adapter", str(tmp_path), "--prompt", "", "--max_new_tokens", "-1"
    )
    assert first.startswith(f"--adapter: {tmp_path}: not an adapter folder")
    assert [problem.partition(":")[0] for problem in others] == ["--prompt", "--max_new_tokens"]


def test_backbone_has_no_gates(problems, no_weights, talkative):
    message = "a backbone without an adapter has no gates; accepted with --adapter"
    flags = ["--backbone", str(talkative), "--prompt", "a", "--gates", "--fast", "0.1"]
    assert problems("generate", *flags) == [f"--gates: {message}", f"--fast: {message}"]


def test_adapter_without_gates_is_reported(problems, no_weights, talkative, tmp_path, monkeypatch):
    monkeypatch.undo()  # the adapter is made on a loaded backbone
    adapter = str(tmp_path / "none")
    save_random_adapter(adapter, talkative, "none")
    assert problems("generate", "--adapter", adapter, "--prompt", "a", "--gates") == [
        f"--gates: {adapter} has no gates (gate: none, update: hira); accepted: an adapter with gates"
    ]


def test_adapter_of_an_eager_only_architecture_is_used_as_it_was_trained(tmp_path, capsys):
    """Bloom has no sdpa attention; the folder says how its backbone is loaded."""
    from tiny_backbone import tiny_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from gatera_lightning import AdapterConfig, BackboneConfig, inject_adapters, save_adapter
    from gatera_lightning.backbone import load_backbone

    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "n_layer": 1, "n_head": 4}
    config = AutoConfig.for_model("bloom", bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    model = load_backbone(BackboneConfig(str(tmp_path / "bloom"), attn_implementation="eager"))
    inject_adapters(model, AdapterConfig(rank=2, target_modules=["query_key_value"]))
    save_adapter(model, tmp_path / "adapter")
    flags = ["--adapter", str(tmp_path / "adapter"), "--max_new_tokens", "3"]
    assert main(["generate", *flags, "--prompt", "Hello"]) == 0, capsys.readouterr().err
    assert main(["gates", "--adapter", flags[1], "--text", "Hello", "--out", str(tmp_path / "g.html")]) == 0
