"""Several hundred bad inputs over all commands end with one sentence, exit code 1 or 2, and no traceback.

``pytest -m "stress or not slow" tests/integration/test_bad_inputs.py -s`` prints the figure of each category.
"""

import os
import re
import time
from collections import Counter

import pytest
from bad_inputs import BadInput, recipes, small_commands, write_files
from tiny_backbone import tiny_args

from gatera_lightning.cli.lightning_cli import GateRACLI
from gatera_lightning.cli.main import main

PROGRAM = "python -m gatera_lightning: "
FAST = {
    "commands",
    "flags of generate",
    "prompts",
    "environment",
    "runs",
    "outputs",
    "checkpoints",
    "flags of gates",
    "flags of harness",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
COUNTS: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module")
def folder(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_files(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def parser_once():
    """Build the parser of Lightning's subcommands once: that takes a second, and parsing a tenth of it."""
    build, built = GateRACLI.setup_parser, {}

    def setup_parser(self, *args):
        if not built:
            build(self, *args)
            names = ("parser", "_subcommand_method_arguments", "_subcommand_parsers")
            built.update({name: getattr(self, name) for name in names})
        vars(self).update(built)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GateRACLI, "setup_parser", setup_parser)
        yield


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    for category in sorted({category for category, _ in COUNTS}):
        print(f"{category:<20}{COUNTS[category, 'held']:5} of {COUNTS[category, 'all']}")


def expand(args, backbone):
    parts = {
        "RECIPE": ["--config", "quickstart.yaml", *tiny_args(backbone)],
        "OWN": [
            "--config",
            "own_data.yaml",
            "--model.backbone.id",
            str(backbone),
            "--data.template",
            "plain",
        ],
        "BACKBONE": [str(backbone)],
    }
    return [part for arg in args for part in parts.get(arg, [arg])]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{number}-{case}".encode("ascii", "backslashreplace").decode(),
                     marks=[] if case.category in FAST else [pytest.mark.slow, pytest.mark.stress])
        for number, case in enumerate([*small_commands(), *recipes()])
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_sentence(tiny_backbone, folder, monkeypatch, capfd, case: BadInput):
    COUNTS[case.category, "all"] += 1
    monkeypatch.chdir(folder)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    code = main(expand(case.args, tiny_backbone))
    _, errors = capfd.readouterr()
    assert code in (1, 2), f"exit code {code}: {errors}"
    message = errors[errors.index(PROGRAM) :] if PROGRAM in errors else errors
    assert message.startswith(PROGRAM), errors
    assert "Traceback" not in errors
    assert not CONTROL.search(message), message
    assert "run it again with --traceback" not in message, (
        "nothing of this package knows the error: " + message
    )
    assert not case.named or any(name in message for name in case.named), message
    if code == 1:
        assert message.count("\n") == 1, message
    assert time.monotonic() - start < 60 or "PYTEST_XDIST_WORKER" in os.environ
    COUNTS[case.category, "held"] += 1
