"""``export --format``: what PEFT and plain Transformers load has the logits of the adapted model."""

import gzip
import json
from contextlib import nullcontext

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    ConfigError,
    inject_adapters,
    load_adapter,
    position_mask,
    record_gates,
    save_adapter,
)
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.cli.main import main
from gatera_lightning.cli.merged_model import read_texts

FILES = ("adapter_config.json", "adapter_model.safetensors")


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits


@pytest.fixture
def load(tiny_backbone):
    """Return a function that loads another copy of the backbone."""
    return lambda **settings: AutoModelForCausalLM.from_pretrained(tiny_backbone, **settings)


@pytest.fixture
def saved(load, randomize, tmp_path):
    """Return a function that saves an adapter and returns its logits and folder."""

    def save(update, gate, size=0.3, **settings):
        model = load()
        alpha = None if update == "hira" else 6.0
        settings = {"rank": 3, "alpha": alpha, "target_modules": ["q_proj", "up_proj"]} | settings
        config = AdapterConfig(update=update, gate=gate, **settings)
        inject_adapters(model, config, torch.Generator().manual_seed(0))
        folder = save_adapter(randomize(model, size=size), tmp_path / f"{update}-{gate}", template="plain")
        every_token = torch.ones(6, dtype=torch.bool)
        with position_mask(model, every_token) if gate == "position" else nullcontext():
            return _logits(model), folder

    return save


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Row {i} of a few words to read."}) for i in range(4)))
    return path


def _bytes(folder):
    return [(folder / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("form", ["peft", "lora"])
@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_own_method_of_peft(load, saved, tmp_path, capsys, update, gate, form):
    expected, folder = saved(update, gate)
    code = main(["export", str(folder), "--out", str(tmp_path / "out"), "--format", form])
    if (form == "lora" and update != "lora") or (gate, update) == ("static", "dora"):
        assert code == 2
        assert f"--format {form}: {folder}: " in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return
    assert code == 0
    model = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert model.peft_config["default"].peft_type == ("HIRA" if update == "hira" else "LORA")
    assert (_logits(model) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("form", ["peft", "lora"])
@pytest.mark.parametrize("gate", ["none", "static"])
def test_abba_is_a_plain_lora(load, saved, tmp_path, gate, form):
    """Of rank (r/2)²; with a rank pattern, that of q_proj is larger than its sides of 32."""
    settings = {"rank": 4, "alpha": 6.0, "rank_pattern": {"q_proj": 12}}
    expected, folder = saved("abba", gate, **settings)
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--format", form]) == 0
    model = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert (_logits(model) - expected).abs().max() < 1e-5
    layer = model.base_model.model.model.layers[0]
    assert (layer.self_attn.q_proj.r["default"], layer.mlp.up_proj.r["default"]) == (36, 4)
    assert layer.mlp.up_proj.scaling["default"] == 1.5
    ours = load()
    config = load_adapter(ours, tmp_path / "out")
    assert (config.update, config.gate.kind, config.rank) == ("lora", "none", 4)
    assert (_logits(ours) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("update", ["lora", "hira"])
def test_position_gate_is_stored_beside_a_plain_adapter_of_peft(load, saved, tmp_path, capsys, update):
    """PEFT ignores the gate and applies the update to all tokens; this package reads both."""
    expected, folder = saved(update, "position")
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--format", "peft"]) == 0
    assert "other programs do not read its 'position' gate" in capsys.readouterr().out
    ours = load()
    assert load_adapter(ours, tmp_path / "out").gate.kind == "position"
    with position_mask(ours, torch.ones(6, dtype=torch.bool)):
        assert (_logits(ours) - expected).abs().max() < 1e-6
    with pytest.warns(UserWarning, match="gatera"):
        theirs = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert (_logits(theirs) - expected).abs().max() < 1e-6
    path = tmp_path / "out" / FILES[0]
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"gatera": {"gate": {"kind": "token"}}}))
    with pytest.raises(AdapterFileError, match="accepted in a folder of PEFT's own methods: a position gate"):
        load_adapter(load(), tmp_path / "out")


@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_round_trip_through_a_method_of_peft_changes_no_byte(load, saved, tmp_path, update):
    expected, folder = saved(update, "none")
    for source, out, form in ((folder, "theirs", "peft"), (tmp_path / "theirs", "ours", "gatera")):
        assert main(["export", str(source), "--out", str(tmp_path / out), "--format", form]) == 0
    assert load_file(tmp_path / "ours" / FILES[1]).keys() == load_file(folder / FILES[1]).keys()
    assert _bytes(tmp_path / "ours")[1] == _bytes(folder)[1]
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "again"), "--format", "peft"]) == 0
    assert _bytes(tmp_path / "again") == _bytes(tmp_path / "theirs")
    model = PeftModel.from_pretrained(load(), tmp_path / "theirs")
    model.save_pretrained(tmp_path / "saved")
    assert _bytes(tmp_path / "saved")[1] == _bytes(tmp_path / "theirs")[1]
    one, other = (json.loads((tmp_path / name / FILES[0]).read_text()) for name in ("saved", "theirs"))
    one["target_modules"] = sorted(one["target_modules"])  # PEFT saves a set, in any order
    assert one == other
    ours = load()
    load_adapter(ours, tmp_path / "saved")
    assert (_logits(ours) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_merged_model_is_a_plain_one(saved, tmp_path, capsys, update, gate):
    expected, folder = saved(update, gate)
    out = tmp_path / "merged"
    assert main(["export", str(folder), "--out", str(out), "--format", "merged"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not adapted_linears(model)
    assert (_logits(model) - expected).abs().max() < 1e-5
    assert (out / "tokenizer.json").is_file()
    report = capsys.readouterr().out
    assert "largest difference of a logit to the adapted model: " in report
    assert "updates lost to the dtype: 0.00% of the changed weights" in report
    assert not list(tmp_path.glob(".merged-*"))


def test_report_says_what_bfloat16_lost(saved, tmp_path, capsys):
    _, folder = saved("hira", "none", size=0.01)
    out = tmp_path / "merged"
    command = ["export", str(folder), "--out", str(out), "--format", "merged", "--dtype", "bfloat16"]
    assert main(command) == 0
    report = capsys.readouterr().out
    lost = float(report.split("lost to the dtype: ")[1].split("%")[0])
    assert 50 < lost <= 100  # updates of 0.1 % are below the rounding step of 0.4 %
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_token_gate_is_merged_only_as_a_constant(load, saved, rows, tmp_path, capsys):
    _, folder = saved("hira", "token")
    out = tmp_path / "merged"
    command = ["export", str(folder), "--out", str(out), "--format", "merged"]
    assert main(command) == 2
    assert "accepted: --constant_gate --rows FILE" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--constant-gate", "--rows", str(rows)]) == 0
    report = capsys.readouterr().out
    before, after = report.split("constant gates: loss ")[1].split(" nats")[0].split(" -> ")
    divergence = float(report.split("KL divergence ")[1].split(" nats")[0])
    assert 1e-8 < divergence < 1
    assert float(before) == pytest.approx(float(after), abs=0.5)


def test_constant_of_a_hard_gate_is_its_share_of_open_tokens(load, saved, rows, tmp_path):
    """And not the mean of σ(z), which is the probability of a draw in training."""
    _, folder = saved("lora", "hard")
    out = tmp_path / "merged"
    flags = ["--format", "merged", "--constant_gate", "--rows", str(rows)]
    assert main(["export", str(folder), "--out", str(out), *flags]) == 0
    model, merged, base = load(), AutoModelForCausalLM.from_pretrained(out), load()
    load_adapter(model, folder)
    tokenizer, logits = AutoTokenizer.from_pretrained(out), {}
    for text in read_texts(str(rows)):
        with torch.no_grad(), record_gates(model.eval()) as gates:
            model(**tokenizer(text, return_tensors="pt"))
        for name, logit in zip(gates.names, gates.logits, strict=True):
            logits[name] = torch.cat([logits.get(name, torch.empty(0)), logit.flatten()])
    for name, layer in adapted_linears(model).items():
        delta = merged.get_submodule(name).weight - base.get_submodule(name).weight
        whole = layer.update.delta_weight(layer.weight)
        share = float((logits[name] > 0).double().mean())
        torch.testing.assert_close(delta, share * whole, rtol=1e-3, atol=1e-5)
        assert abs(share - float(logits[name].sigmoid().mean())) > 1e-3


def test_constant_gates_change_nothing_where_gates_are_constant(load, saved, rows, tmp_path, capsys):
    """With w = 0 a token gate has one value, so its mean is exact."""
    expected, folder = saved("hira", "token")
    model = load()
    load_adapter(model, folder)
    for layer in adapted_linears(model).values():
        layer.gate.weight.data.zero_()
    expected = _logits(model)
    save_adapter(model, folder)
    out = tmp_path / "merged"
    flags = ["--format", "merged", "--constant_gate", "--rows", str(rows)]
    assert main(["export", str(folder), "--out", str(out), *flags]) == 0
    assert (_logits(AutoModelForCausalLM.from_pretrained(out)) - expected).abs().max() < 1e-5
    assert float(capsys.readouterr().out.split("KL divergence ")[1].split(" nats")[0]) < 1e-8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "gguf"], "--format"),
        (["--constant_gate"], "--constant_gate: accepted with --format merged and --rows FILE"),
        (["--rows", "rows.txt"], "--rows: accepted with --format merged"),
        (
            ["--format", "merged", "--out", "."],
            "--out: . exists; accepted with --format merged: a new folder",
        ),
    ],
)
def test_bad_flag_is_named(saved, tmp_path, monkeypatch, capsys, flags, message):
    _, folder = saved("hira", "none")
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(folder), "--out", "new", *flags]) == 2
    assert message in capsys.readouterr().err


TEXTS = ["Row 1 of a few words.", "Zeile 2:\tä", "The third"]


def _table(path, name, texts=TEXTS):
    """Write texts in the format of a name's ending."""
    file = path / name
    rows = [{"text": text, "other": 1} for text in texts]
    content = {
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".json": json.dumps(rows),
        ".csv": "\n".join(["other,text", *(f'1,"{text}"' for text in texts)]),
        ".txt": "\n\n".join(texts),
    }
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return str(file)
    (kind,) = [kind for kind in content if name.removesuffix(".gz").endswith(kind)]
    raw = content[kind].encode()
    file.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return str(file)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "a.jsonl.gz", "a.json.gz", "a.txt.gz"]
)
def test_rows_are_read_from_every_kind_of_source(tmp_path, name):
    location = _table(tmp_path, name)
    assert read_texts(location) == TEXTS
    assert read_texts(f"{location}[1:3]") == TEXTS[1:]


@pytest.mark.parametrize("name", ["notes.log", "notes.md", "notes", "notes.log.gz"])
def test_file_of_another_name_is_read_as_lines_of_text(tmp_path, name):
    raw = "\n\n".join(TEXTS).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read_texts(str(tmp_path / name)) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a"}\nnot json', r"rows.jsonl, row 2: not valid JSON \("),
        ("rows.jsonl", '{"prompt": "a"}', "row 1: the fields prompt; accepted: a row with a field text"),
        ("rows.jsonl", '{"text": "a"}\n{"text": 5}', "row 2: field 'text': 5; accepted"),
        ("rows.json", '[{"text": "a"}, {"text": " "}]', "row 2: field 'text': ' '; accepted"),
        ("rows.json", '[{"text": "a"}, ["b"]]', r"row 2: \['b'\]; accepted"),
        ("rows.json", '{"text": "a"}', "expected a JSON list of rows, found dict"),
        ("rows.json.gz", "[]", "not a valid gzip file"),
        ("rows.parquet", "PAR1", "not a valid Parquet file"),
        ("rows.csv", "text,other\na", "row 1 .*expected 2 fields"),
        ("rows.xlsx", b"PK\3\4\0", "not a text file"),
        ("rows.txt", "\n\n", "has no texts"),
        ("rows.txt", b"\xff\xfe", "not UTF-8 text"),
        ("missing/rows.txt", None, "cannot be read"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"^--rows: .*{message}"):
        read_texts(str(path))


def test_slice_that_selects_no_rows_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^--rows: .*selects no texts; .* has 3$"):
        read_texts(_table(tmp_path, "a.json") + "[3:]")


def test_bad_row_is_named_before_the_backbone_loads(saved, tmp_path, monkeypatch, capsys):
    _, folder = saved("hira", "token")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    rows = _table(tmp_path, "a.parquet", ["one", "", "three"])
    flags = ["--format", "merged", "--constant_gate", "--rows", rows]
    assert main(["export", str(folder), "--out", str(tmp_path / "new"), *flags]) == 2
    assert f"--rows: {rows}, row 2: field 'text': ''" in capsys.readouterr().err
