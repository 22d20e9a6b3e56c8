"""A table of bad inputs for every command, by category: what a user may get wrong, and what must be named."""

import json
import random
import string
from dataclasses import dataclass, field
from pathlib import Path

CONFIG_TEXTS = {
    "empty": "",
    "comment": "# nothing\n",
    "scalar": "hello\n",
    "number": "3\n",
    "list": "- a\n- b\n",
    "tab": "trainer:\n\tmax_steps: 3\n",
    "unclosed list": "trainer: {max_steps: [1, 2\n",
    "unclosed text": 'trainer: {accelerator: "cpu\n',
    "key twice": "seed_everything: 1\nseed_everything: 2\n",
    "nested key twice": "trainer:\n  max_steps: 1\n  max_steps: 2\n",
    "flow key twice": "model: {adapter: {rank: 1, rank: 2}}\n",
    "merge key twice": "x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x\n",
    "python tag": "trainer: !!python/object/apply:os.system [ls]\n",
    "own tag": "trainer: !mine {max_steps: 1}\n",
    "recursive alias": "a: &a [*a]\n",
    "unknown alias": "a: *b\n",
    "alias bomb": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefg", "bcdefgh", strict=True)),
    "deep list": "[" * 5000,
    "deep mapping": "{a: " * 5000,
    "two documents": "seed_everything: 1\n---\nseed_everything: 2\n",
    "list as key": "? [a]\n: 1\n",
    "number as key": "1: 2\n",
    "null as key": "null: 2\n",
    "null byte": "a: \0\n",
    "yaml 3": "%YAML 3.0\n---\na: 1\n",
    "json with comment": '{"trainer": {"max_steps": 1}, // x\n}',
    "unknown section": "optimiser: {lr: 1}\n",
    "misspelled section": "trianer: {max_steps: 3}\n",
    "misspelled key": "trainer: {max_step: 3}\n",
    "misspelled nested key": "model: {adapter: {rnak: 3}}\n",
    "misspelled data key": "data: {init_args: {trian: [everyday]}}\n",
    "misspelled gate key": "model: {adapter: {gate: {kind: token, bais: 1}}}\n",
    "unknown gate": "model: {adapter: {gate: tokne}}\n",
    "unknown update": "model: {adapter: {update: hirra}}\n",
    "unknown data class": "data: {class_path: gatera_lightning.datamodules.CommonsenseData}\n",
    "unknown callback": "trainer: {callbacks: [{class_path: RunSumary}]}\n",
    "unknown logger": "trainer: {logger: {class_path: TensorBoardLoger}}\n",
    "logger's key": "trainer: {logger: {class_path: CSVLogger, init_args: {save_dri: x}}}\n",
    "section is number": "trainer: 3\n",
    "section is list": "model: [1, 2]\n",
    "section is text": "model: adapter\n",
    "subsection is number": "model: {adapter: 3}\n",
    "data is number": "data: 3\n",
    "data is list": "data: [a]\n",
    "init_args is text": "data: {init_args: x}\n",
    "callback is number": "trainer: {callbacks: [3]}\n",
    "text for number": "trainer: {max_steps: many}\n",
    "list for number": "model: {adapter: {rank: [1]}}\n",
    "mapping for number": "model: {optimizer: {lr: {a: 1}}}\n",
    "text for truth": "trainer: {enable_progress_bar: perhaps}\n",
    "unknown choice": "model: {backbone: {dtype: flaot32}}\n",
    "subcommand": "subcommand: test\n",
    "config in config": "config: other.yaml\n",
}
"""What a config may hold -> its text."""

ROWS = {
    "empty": b"",
    "no json": b"hello",
    "cut": b'[{"instruction": "a", "output": "b"',
    "number": b"3",
    "null": b"null",
    "list of numbers": b"[1, 2, 3]",
    "list of lists": b"[[1], [2]]",
    "list of null": b"[null]",
    "empty list": b"[]",
    "empty rows": b"[{}, {}]",
    "wrong fields": b'[{"a": 1}]',
    "null fields": b'[{"instruction": null, "output": null}]',
    "list fields": b'[{"instruction": ["a"], "output": ["b"]}]',
    "mapping fields": b'[{"instruction": {"a": 1}, "output": "b"}]',
    "empty texts": b'[{"instruction": "", "output": ""}]',
    "huge integer": b'[{"instruction": "a", "output": ' + b"9" * 5000 + b"}]",
    "not a number": b'[{"instruction": NaN, "output": "b"}]',
    "surrogate": b'[{"instruction": "\\ud800", "output": "b"}]',
    "deep": b"[" * 100_000,
    "deep mapping": b'{"a":' * 100_000,
    "utf-16": '[{"instruction": "a", "output": "b"}]'.encode("utf-16"),
    "latin-1": '[{"instruction": "é", "output": "b"}]'.encode("latin-1"),
    "null bytes": b"\0" * 100,
    "gzip header": b"\x1f\x8b\x08\x00broken",
    "parquet header": b"PAR1broken",
    "messages is text": b'[{"messages": "hello"}]',
    "messages is number": b'[{"messages": 3}]',
    "messages is empty": b'[{"messages": []}]',
    "message is text": b'[{"messages": ["hello"]}]',
    "message without role": b'[{"messages": [{"content": "a"}]}]',
    "message without content": b'[{"messages": [{"role": "user"}]}]',
    "unknown role": b'[{"messages": [{"role": "usr", "content": "a"}]}]',
    "two users": b'[{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}]',
}
"""What a file of rows may hold."""

CHECKPOINTS = {"empty": b"", "text": b"hello", "zip": b"PK\x03\x04broken", "zeros": b"\0" * 4096}
"""What a checkpoint may hold."""

RUNS = {"empty": "", "text": "hello", "list": "[]\n", "null": "null\n", "fields": "{}\n"}
"""What the files of an evaluation may hold."""

BACKBONES = ["", "none", "file.txt", "adapters", "package:none", "package:os.path", "package:", "a/b/c", "~x"]
BACKBONES += ["x.gguf", "file.txt/x", "\x1b[2J", "é", "/dev/null", "adapters/empty"]

VARIABLES = ["MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID"]
VARIABLES += ["OMP_NUM_THREADS"]

NUMBERS = ["trainer.max_steps", "trainer.devices", "model.adapter.rank", "model.adapter.alpha"]
NUMBERS += ["model.adapter.dropout", "model.adapter.gate.bias", "model.optimizer.lr"]
NUMBERS += ["model.optimizer.warmup_steps", "data.batch_size", "data.max_length"]
NUMBERS += ["checkpoint.every_n_steps", "watchdog.factor", "throughput.every_n_steps"]

CHOICES = ["trainer.strategy", "trainer.accelerator", "trainer.precision", "trainer.profiler"]
CHOICES += ["model.adapter.update", "model.adapter.gate", "model.backbone.dtype"]
CHOICES += ["model.optimizer.schedule", "data.template", "data.train_on", "checkpoint.mode"]
CHOICES += ["checkpoint.monitor", "trainer.logger", "trainer.callbacks", "data"]

ADAPTER_CONFIGS = {
    "empty": "",
    "no json": "{",
    "list": "[]",
    "null": "null",
    "number": "3",
    "no fields": "{}",
    "deep": "[" * 100_000,
}
"""What `adapter_config.json` of an adapter folder may hold."""


@dataclass(frozen=True)
class BadInput:
    """One bad input.

    Args:
        category: What kind of input is bad.
        name: What is wrong with it.
        args: The command line; `RECIPE` stands for the flags of a tiny recipe.
        named: What the message must name; any of these.
    """

    category: str
    name: str
    args: tuple[str, ...]
    named: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.category}: {self.name}".replace(" ", "_")


def misspelled(name: str, draw: random.Random) -> str:
    """A name with two letters swapped, one missing, one doubled or one replaced."""
    at = draw.randrange(1, len(name) - 1)
    kind = draw.randrange(4)
    if kind == 0 and name[at] != name[at + 1]:
        return name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    if kind == 1:
        return name[:at] + name[at + 1 :]
    if kind == 2:
        return name[:at] + name[at] + name[at:]
    return name[:at] + draw.choice(string.ascii_lowercase.replace(name[at], "")) + name[at + 1 :]


def write_files(folder: Path) -> None:
    """Write every bad file that the table names."""
    (folder / "configs").mkdir()
    for name, text in CONFIG_TEXTS.items():
        (folder / "configs" / f"{name}.yaml").write_text(text)
    (folder / "configs" / "latin.yaml").write_bytes(b"a: \xe9\n")
    (folder / "configs" / "folder.yaml").mkdir()
    (folder / "rows").mkdir()
    for name, content in ROWS.items():
        for suffix in ("json", "jsonl", "csv", "parquet"):
            (folder / "rows" / f"{name}.{suffix}").write_bytes(content)
    for name, text in ADAPTER_CONFIGS.items():
        adapter = folder / "adapters" / name
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(text)
        (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    (folder / "adapters" / "no files").mkdir()
    (folder / "checkpoints").mkdir()
    for name, content in CHECKPOINTS.items():
        (folder / "checkpoints" / f"{name}.ckpt").write_bytes(content)
    (folder / "runs").mkdir()
    for name, text in RUNS.items():
        run = folder / "runs" / name
        run.mkdir()
        (run / "predictions.jsonl").write_text(text)
        (run / "evaluation.json").write_text(text)
    (folder / "file.txt").write_text("a file\n")


def small_commands() -> list[BadInput]:
    """Bad flags, folders and files of the commands that do without a recipe."""
    found = []

    def add(category: str, name: str, *args: str, named: tuple[str, ...] = ()) -> None:
        found.append(BadInput(category, name, args, named))

    draw = random.Random(0)
    commands = ["fit", "validate", "test", "predict", "chat", "generate", "preview", "estimate"]
    commands += ["demo", "compare", "gates", "export", "submit", "harness", "serve"]
    for command in commands:
        for _ in range(3):
            typo = misspelled(command, draw)
            if typo not in commands:
                add("commands", typo, typo, named=(typo,))
    for text in ("", " ", "FIT", "fit,test", "../fit", "\x1b[2J", "é", "None", "0"):
        add("commands", repr(text), text, named=("COMMAND",))
    generate = ("generate", "--prompt", "x", "--backbone", "BACKBONE")
    flags = {
        "max_new_tokens": ("0", "-1", "x", "1.5", "", "1e9x"),
        "fast": ("0", "0.6", "-1", "nan", "x"),
        "temperature": ("-1", "nan", "inf", "x", ""),
        "top_p": ("0", "1.5", "-1", "nan", "x"),
        "seed": ("x", "1.5", ""),
        "dtype": ("flaot32", "", "int8", "FLOAT32"),
        "template": ("chta", "", "x", "none "),
    }
    kind = "flags of generate"
    for name, values in flags.items():
        for value in values:
            add(kind, f"{name} {value!r}", *generate, f"--{name}", value, named=(f"--{name}",))
        typo = misspelled(name, draw)
        add(kind, typo, *generate, f"--{typo}", "1", named=(typo,))
        if name != "fast":  # a flag whose value may be left out
            add(kind, f"{name} without value", *generate, f"--{name}", named=(f"--{name}",))
    harness = {
        "tasks": ("", ",", "gatera_arc_esy", "gatera_arc_easy"),
        "limit": ("0", "-1", "1.5", "nan", "inf", "x", ""),
        "num_fewshot": ("-1", "x", "1.5", "2"),
        "batch_size": ("0", "-1", "x", "1.5", "Auto"),
        "max_length": ("0", "1", "x"),
        "template": ("chta", "", "none"),
        "answer_format": ("lable", ""),
        "dtype": ("flaot32", "int8"),
        "data_dir": ("none", "file.txt"),
        "include_path": ("none", "file.txt"),
        "out": ("file.txt", "file.txt/x", "/proc/x"),
    }
    for name, values in harness.items():
        usual = {"--backbone": "BACKBONE", "--tasks": "gatera_everyday", "--out": "x", "--template": "plain"}
        args = [part for flag, value in usual.items() if flag != f"--{name}" for part in (flag, value)]
        for value in values:
            wrong = ("harness", *args, f"--{name}", value)
            add("flags of harness", f"{name} {value!r}", *wrong, named=(f"--{name}", "--data_dir"))
        typo = misspelled(name, draw)
        add("flags of harness", typo, "harness", *args, f"--{typo}", "1", named=(typo,))
    for prompt in ("", " ", "\udc80", "\n"):
        args = ("generate", "--backbone", "BACKBONE", "--prompt", prompt)
        add("prompts", repr(prompt), *args, named=("--prompt",))
    for backbone in BACKBONES:
        args = ("generate", "--prompt", "x", "--backbone", backbone)
        add("backbones", repr(backbone), *args, named=("backbone",))
    for folder in ("none", "file.txt", "adapters/no files", *(f"adapters/{n}" for n in ADAPTER_CONFIGS), ""):
        for command in (
            ("generate", "--prompt", "x"),
            ("chat",),
            ("gates", "--out", "x.html"),
            ("harness", "--tasks", "gatera_everyday", "--out", "x"),
            ("serve",),
        ):
            args = (*command, *(() if command == ("serve",) else ("--adapter",)), folder)
            add("adapter folders", f"{command[0]} {folder}", *args, named=(folder or "adapter",))
    for run in ("none", "file.txt", *(f"runs/{name}" for name in RUNS), "adapters", "/"):
        add("runs", run, "compare", run, run, named=(run,))
        add("runs", f"{run} alone", "compare", run, named=("RUN", run))
    for out in ("x.txt", "x", "none/x.md", "/proc/x.md"):
        args = ("compare", "runs/none", "runs/null", "--out", out)
        add("outputs", f"compare {out}", *args, named=("--out", "runs"))
    for path in ("none.ckpt", "file.txt", "checkpoints", "adapters", "/dev/null"):
        add("checkpoints", f"export {path}", "export", path, "--out", "x", named=(path, "CHECKPOINT"))
    for name in CHECKPOINTS:
        path = f"checkpoints/{name}.ckpt"
        add("checkpoints", f"export {path}", "export", path, "--out", "x", named=(path, "CHECKPOINT"))
        add("checkpoint files", f"fit {path}", "fit", "RECIPE", "--ckpt_path", path, named=(path,))
        add("checkpoint files", f"test {path}", "test", "RECIPE", "--ckpt_path", path, named=(path,))
    for out in ("file.txt", "file.txt/x", ""):
        add("outputs", f"export {out}", "export", "checkpoints/empty.ckpt", "--out", out)
    wrong = {"--row": "1", "--rows": "0", "--format": "pdf", "--generate": "-1", "--dtype": "x", "--txt": "a"}
    for name, value in wrong.items():
        args = ("gates", "--adapter", "adapters/empty", "--out", "x.html", name, value)
        add("flags of gates", f"{name} {value}", *args, named=(name, "adapter"))
    for name in VARIABLES:
        for value in ("x", "", "-1", "1.5"):
            case = BadInput("environment", f"{name} {value!r}", ("compare", "a", "b"), (name,), {name: value})
            found.append(case)
    return found


def recipes() -> list[BadInput]:
    """Bad configs, flags and rows of the commands that take a recipe."""
    found = []

    def add(category: str, name: str, *args: str, named: tuple[str, ...]) -> None:
        found.append(BadInput(category, name, args, named))

    for name in (*CONFIG_TEXTS, "latin", "folder", "none"):
        args = ("fit", "RECIPE", "--config", f"configs/{name}.yaml")
        add("configs", name, *args, named=(f"{name}.yaml", "there is", "; accepted: ", "config"))
    for name in ("quickstrat.yaml", "lroa.yaml", "overlays/dorra.yaml", "", "/", "/dev/null/x", "cpu.yml"):
        add("config names", repr(name), "fit", "--config", name, named=("--config",))
    for setting in NUMBERS:
        last = setting.rpartition(".")[2]
        for value in ("x", "[1]", "nan", "{a: 1}", "1e", *(("-7",) if last != "bias" else ())):
            add("numbers", f"{setting} {value}", "fit", "RECIPE", f"--{setting}={value}", named=(last,))
    for setting in CHOICES:
        last = setting.rpartition(".")[2]
        for value in ("hirra", "None ", "[x]"):
            add("choices", f"{setting} {value}", "fit", "RECIPE", f"--{setting}={value}", named=(last,))
    draw = random.Random(1)
    for flag in (*NUMBERS, *CHOICES, "ckpt_path", "seed_everything", "config"):
        typo = misspelled(flag, draw)
        last = typo.rpartition(".")[2]
        add("misspelled flags", typo, "fit", "RECIPE", f"--{typo}", "1", named=(last,))
    for name in ROWS:
        for suffix in ("json", "jsonl", "csv", "parquet"):
            args = ("preview", "OWN", "--data.train", json.dumps([f"rows/{name}.{suffix}"]))
            add("rows", f"{name}.{suffix}", *args, named=(f"{name}.{suffix}",))
    return found
