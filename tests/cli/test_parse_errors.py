"""Errors of argparse and jsonargparse in one sentence, with the closest accepted name."""

import argparse
import re
from pathlib import Path

import pytest

from gatera_lightning.cli.error_translation import ParseError
from gatera_lightning.cli.parse_errors import closest_setting
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.errors import ConfigError, near_miss

SETTINGS = [
    "--model.adapter",
    "--model.adapter.rank",
    "--model.optimizer.lr",
    "--data",
    "--trainer.max_steps",
]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("--modle.adapter.rank", "--model.adapter.rank"),
        ("--model.adapter.rnak", "--model.adapter.rank"),
        ("--adaptr", "--model.adapter"),
        ("--rank", "--model.adapter.rank"),
        ("--lr", "--model.optimizer.lr"),
        ("--trainer.max_step", "--trainer.max_steps"),
        ("--model.adapter.rank.x", "--model.adapter.rank"),
        ("--something.else", None),
    ],
)
def test_closest_setting(name, meant):
    assert closest_setting(name, SETTINGS) == (f"; did you mean {meant!r}?" if meant else "")


@pytest.mark.parametrize("given", ["", " "])
def test_empty_path_is_not_the_working_folder(given):
    parser = SubcommandParser("compare")
    parser.add_argument("--out", type=Path)
    with pytest.raises(ParseError) as caught:
        parser.parse_args(["--out", given])
    assert str(caught.value) == f"--out: {given!r}; accepted: a path, and . for the working folder"
    assert parser.parse_args(["--out", "."]).out == Path()


@pytest.fixture
def small_parser():
    parser = SubcommandParser("compare")
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--format", choices=["html", "json"])
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--one")
    exclusive.add_argument("--other")
    return parser


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "--row", "3"], "--row: there is no such setting; did you mean '--rows'?"),
        (["a", "--rows", "many"], "--rows: 'many'; accepted: an integer"),
        (["a", "--share", "x"], "--share: 'x'; accepted: a number"),
        (["a", "--rows"], "--rows: has no value; expected one"),
        (
            ["a", "--format", "hmtl"],
            "--format: 'hmtl' is unknown; accepted: html, json; did you mean 'html'?",
        ),
        ([], "RUN: required, but not given"),
        (["--formt=html"], "--formt: there is no such setting; did you mean '--format'?"),
        (["a", "--one", "1", "--other", "2"], "--other: not allowed with argument --one"),
    ],
    ids=range(8),
)
def test_error_of_small_command(small_parser, args, message):
    with pytest.raises(ParseError) as caught:
        small_parser.parse_args(args)
    assert str(caught.value) == message


def test_small_command_leaves_flags_of_fit_alone():
    parser = SubcommandParser("preview")
    parser.add_argument("--rows")
    flags = ["--model.adapter.row", "3", "--config", "x", "--data=y", "--watchdog.factor", "2"]
    assert parser.parse_before_fit(["--rows", "2", *flags]) == (
        argparse.Namespace(rows="2", traceback=False),
        flags,
    )
    with pytest.raises(ParseError, match=r"--rowz: there is no such setting; did you mean '--rows'\?"):
        parser.parse_before_fit(["--rowz=2"])


PLAIN = [
    (
        ["--modle.adapter.rank", "3"],
        "--modle.adapter.rank: there is no such setting; did you mean '--model.ada",
    ),
    (
        ["--trainer.max_step", "3"],
        "--trainer.max_step: there is no such setting; did you mean '--trainer.max_s",
    ),
    (["--trainer.max_steps"], "--trainer.max_steps: has no value"),
    (["hello"], "'hello': unexpected argument; accepted: flags, which start with --"),
    (
        ["--data.trian", "[a]"],
        "data.trian: there is no such setting of CommonsenseDataModule; did you mean 'tr",
    ),
    (
        ["--data", "CommonsenseDataModul"],
        "data: 'CommonsenseDataModul' is no known class; accepted: Commonsense",
    ),
    (
        ["--data.class_path", "foo.Bar"],
        "data: 'foo.Bar' is no known class (No module named 'foo'); accepted: ",
    ),
    (
        ["--trainer.logger", "TensorBoardLoger"],
        "trainer.logger: 'TensorBoardLoger' is no known class; accepted",
    ),
    (
        ["--trainer.callbacks+=EarlyStoping"],
        "trainer.callbacks: 'EarlyStoping' is no known class; accepted: ",
    ),
    (
        ["--trainer.strategy.class_path", "AdapterShardingStrateg"],
        "trainer.strategy: 'AdapterShardingStrateg' is",
    ),
    (["--model.adapter.gate.bias", "x"], "model.adapter.gate.bias: 'x'; accepted: a number"),
    (
        ["--model.adapter.gate.bais", "1"],
        "model.adapter.gate.bais: there is no such setting of TokenGateConfig; ",
    ),
    (["--model.adapter.gate", "3"], "model.adapter.gate: '3' is unknown; accepted: none, static, token"),
    (
        ["--model.backbone.dtype", "flaot32"],
        "model.backbone.dtype: 'flaot32'; accepted: auto, bfloat16, float32",
    ),
    (
        ["--model.decoding.max_new_token", "3"],
        "model.decoding.max_new_token: there is no such setting of Decodin",
    ),
    (["--model.adapter.rank", ""], "model.adapter.rank: ''; accepted: an integer"),
    (["--model.adapter.layers", "x"], "model.adapter.layers: 'x'; accepted: a list, such as '[a, b]', null"),
    (
        ["--model", "none.yaml"],
        "model: 'none.yaml' is no file; accepted: a file of settings, or the settings",
    ),
    (
        ["--data.init_args", "{train: [a], train: [b]}"],
        "data: line 1 of a value: the key 'train' is given twice",
    ),
    (["--print_config=x"], "--print_config: 'x'; accepted: --print_config or --print_config=skip_default"),
]


@pytest.fixture(scope="module")
def fit_parser():
    """The parser of `fit`, built once: that takes longer than parsing."""
    from lightning.pytorch.cli import LightningCLI

    from gatera_lightning.cli.lightning_cli import GateRACLI

    parsers = []

    class Parser(GateRACLI):
        @staticmethod
        def subcommands():
            return {"fit": LightningCLI.subcommands()["fit"]}

        def parse_arguments(self, parser, args):
            parsers.append(parser)
            raise StopIteration

    with pytest.raises(StopIteration):
        Parser([])
    return parsers[0]


def refusal(parser, *args):
    with pytest.raises(ConfigError) as caught:
        parser.parse_args(["fit", *args])
    return str(caught.value)


QUICKSTART = """\
data:
  class_path: gatera_lightning.datamodules.CommonsenseDataModule
  init_args: {template: plain, answer_format: content, train_on: response}
"""


@pytest.mark.parametrize(
    ("args", "message"), PLAIN, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_error_of_flags(fit_parser, tmp_path, args, message):
    (tmp_path / "base.yaml").write_text(QUICKSTART)
    found = refusal(fit_parser, "--config", str(tmp_path / "base.yaml"), *args)
    assert found.startswith(message)
    assert "\n" not in found
    if "is no known class" in found and "foo" not in found:
        assert "; did you mean '" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {adaptr: {rank: 3}}",
            "model.adaptr.rank: there is no such setting; did you mean 'model.adapter.",
        ),
        (
            "modle: {adapter: {rank: 3}}",
            "modle.adapter.rank: there is no such setting; did you mean 'model.adapt",
        ),
        (
            "trainer: {max_step: 3}",
            "trainer.max_step: there is no such setting; did you mean 'trainer.max_steps'",
        ),
        ("trainer: {max_steps: abc}", "trainer.max_steps: 'abc'; accepted: an integer"),
        ("trainer: 3", "mine.yaml: trainer: 3; accepted: a mapping of settings"),
        ("model: {adapter: [1]}", "mine.yaml: model.adapter: [1]; accepted: a mapping of settings"),
        (
            "model: hello",
            "model: 'hello' is no file; accepted: a file of settings, or the settings themselves",
        ),
        ("data: 3", "data: '3'; accepted: a class, as class_path with init_args, null"),
        ("[1, 2]", "--config: mine.yaml holds [1, 2]; accepted: a mapping of settings"),
        ("", "--config: mine.yaml is empty; accepted: a mapping of settings"),
        ("# a comment\n", "--config: mine.yaml is empty"),
        ("hello", "--config: mine.yaml holds 'hello'; accepted: a mapping"),
        ("3", "--config: '3'; accepted: a mapping of settings"),
        ("1: 2", "--config: the key 1 is no text; accepted: names of settings"),
        ("{a b: 1}", "--config: the key 'a b' holds a space; accepted: names of settings"),
        ("checkpoint: {mode: mn}", "checkpoint.mode: 'mn'; accepted: min, max, null; did you mean 'min'?"),
        (
            "trainer: {logger: {class_path: CSVLogger, init_args: {save_dri: x}}}",
            "trainer.logger.save_dri: there i",
        ),
    ],
    ids=range(17),
)
def test_error_of_config(fit_parser, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    found = refusal(fit_parser, "--config", str(tmp_path / "mine.yaml"))
    assert found.startswith(message)
    assert "\n" not in found


CLASS_SETTINGS = [
    "data", "model", "model.adapter", "model.adapter.gate", "model.backbone", "model.optimizer",
    "model.decoding", "model.objectives", "trainer.accelerator", "trainer.strategy", "trainer.precision",
    "trainer.logger", "trainer.callbacks", "trainer.profiler", "trainer.plugins", "trainer.devices",
    "checkpoint.monitor", "data.init_args.train",
]  # fmt: skip
BAD_VALUES = [
    "{class_path: 3}", "{class_path: int}", "{class_path: os.path}", "{init_args: 3}", "{init_args: {zz: 1}}",
    "{zz: 1}", "[1, {a: b}]", "-7.5", "torch.nn.Linear", "{dict_kwargs: {a: 1}}", "EarlyStopping",
    "{class_path: torch.nn.Linear, init_args: {in_features: x}}",
    "{class_path: lightning.pytorch.callbacks.EarlyStopping}",
    "[{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: a, patience: {b: 1}}}]",
    "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: {a: 1}}}",
]  # fmt: skip
INTERNALS = re.compile(
    r"NestedArg|Namespace|\bat 0x|<class|<function|typing\.|Union\[|Optional\[|NoneType|Subtypes|Parser key|"
    r"instantiatable|Traceback|\n"
)


@pytest.mark.parametrize("setting", CLASS_SETTINGS)
def test_no_message_shows_internals(fit_parser, tmp_path, setting):
    (tmp_path / "base.yaml").write_text(QUICKSTART)
    messages = []
    for value in BAD_VALUES:
        for flags in ([f"--{setting}={value}"], [f"--{setting}.zz={value}"], [f"--{setting}+={value}"]):
            try:
                fit_parser.parse_args(["fit", "--config", str(tmp_path / "base.yaml"), *flags])
            except ConfigError as error:
                messages.append(f"{flags[0]} -> {error}")
    assert len(messages) >= 15
    assert [message for message in messages if INTERNALS.search(message.partition(" -> ")[2])] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer: {max_steps: 1e3}",
            "trainer.max_steps: '1000.0'; accepted: an integer; did you mean 1000?",
        ),
        (
            "model: {adapter: {rank: '8.0'}}",
            "model.adapter.rank: '8.0'; accepted: an integer; did you mean 8?",
        ),
        ("model: {adapter: {rank: '8.5'}}", "model.adapter.rank: '8.5'; accepted: an integer"),
        ("model: {adapter: {rank: .inf}}", "model.adapter.rank: 'inf'; accepted: an integer"),
    ],
    ids=range(4),
)
def test_whole_number_is_suggested_for_an_integer(fit_parser, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert refusal(fit_parser, "--config", str(tmp_path / "mine.yaml")) == message


@pytest.mark.parametrize("number", ['"1e-3"', "1e-3", '"0.001"'])
def test_number_in_quotes_is_a_number(fit_parser, tmp_path, number):
    (tmp_path / "mine.yaml").write_text(f"{QUICKSTART}model: {{optimizer: {{lr: {number}}}}}")
    assert (
        fit_parser.parse_args(["fit", "--config", str(tmp_path / "mine.yaml")]).fit.model.optimizer.lr
        == 0.001
    )


@pytest.mark.parametrize("flag", ["--bogus", "--bogus=1", "--trainer.bogus"])
def test_unknown_flag_is_named_before_missing_data(fit_parser, flag):
    assert refusal(fit_parser, flag).startswith(f"{flag.partition('=')[0]}: there is no such setting")


def test_empty_section_is_as_good_as_none(fit_parser, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"trainer:\n  # max_steps: 3\nmodel:\n{QUICKSTART}")
    assert fit_parser.parse_args(["fit", "--config", str(tmp_path / "mine.yaml")]).fit.trainer.max_steps == -1


def test_suggestion_is_never_what_was_given():
    assert closest_setting("verbose", ["verbose", "trainer.max_steps"]) == ""
    assert near_miss("verbose", ["verbose"]) == ""
