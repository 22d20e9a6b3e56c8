"""Only the user's own flags give trust: no config runs code of others where it is only looked at."""

import json
import sys
from pathlib import Path

import pytest
from jsonargparse._util import import_object

from gatera_lightning.cli.main import main
from gatera_lightning.cli.trusted_code import flags_trust_remote_code, own_classes_only
from gatera_lightning.errors import ConfigError

LOOKING = [["preview"], ["estimate"], ["submit", "--dry-run", "--gpus-per-node", "0"]]
TRUST = "model.backbone.trust_remote_code"


@pytest.fixture
def foreign(working_folder, monkeypatch):
    """A package in the working folder that leaves a mark when it is imported, and its name."""
    monkeypatch.syspath_prepend(str(working_folder))
    (working_folder / "foreign_package").mkdir()
    mark = "from pathlib import Path\nPath('imported').touch()\n"
    (working_folder / "foreign_package" / "__init__.py").write_text(mark)
    own = "import gatera_lightning.datamodules as d\nclass Own(d.CommonsenseDataModule): ''\n"
    (working_folder / "foreign_package" / "data.py").write_text(own)
    yield "foreign_package.data.Own"
    for name in [name for name in sys.modules if name.startswith("foreign_package")]:
        del sys.modules[name]


SECTIONS = {
    "data": lambda name: {"data": {"class_path": name}},
    "logger": lambda name: {"trainer": {"logger": {"class_path": name}}},
    "logger as text": lambda name: {"trainer": {"logger": name}},
    "callback": lambda name: {"trainer": {"callbacks": [{"class_path": name}]}},
    "strategy": lambda name: {"trainer": {"strategy": {"class_path": name}}},
    "gate": lambda name: {"model": {"adapter": {"gate": {"class_path": name}}}},
    "objective": lambda name: {"model": {"objectives": [{"class_path": name}]}},
}


@pytest.mark.parametrize(
    ("command", "section"),
    [(LOOKING[0], section) for section in SECTIONS] + [(command, "data") for command in LOOKING[1:]],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_class_of_a_config_is_not_imported_by_looking(foreign, recipe, capsys, command, section):
    Path("theirs.yaml").write_text(json.dumps(SECTIONS[section](foreign)))
    assert main([*command, *recipe, "--config", "theirs.yaml"]) == 2
    error = capsys.readouterr().err
    assert f"class_path: '{foreign}' in a config is code of another package" in error
    assert f"--data {foreign}; fit runs it" in error
    assert not Path("imported").exists()


def test_class_of_a_flag_is_imported(foreign, recipe, capsys):
    flags = [
        f"--data={foreign}",
        "--data.init_args.template",
        "plain",
        "--data.init_args.train_on",
        "response",
    ]
    main(["preview", *recipe, *flags, "--data.init_args.answer_format", "content"])
    assert "another package" not in capsys.readouterr().err
    assert Path("imported").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.init_args.train", "[foreign_package.jsonl]"],
        ["--model.backbone.id", "foreign_package.data.Own"],
    ],
    ids=["file", "other flag"],
)
def test_name_in_a_flag_opens_no_other_class(foreign, recipe, capsys, flags):
    Path("foreign_package.jsonl").write_text("")
    Path("theirs.yaml").write_text(json.dumps({"data": {"class_path": foreign}}))
    assert main(["preview", *recipe, "--config", "theirs.yaml", *flags]) == 2
    assert not Path("imported").exists()


NOT_NAMED = {
    "data file": ["--data.init_args.train", "[{package}.jsonl]"],
    "its path as data": ["--data.init_args.train", "[{path}]"],
    "text": ["--data.init_args.template", "{path}"],
    "another class of its module": ["--trainer.logger", "{package}.data.Other"],
    "flag without a value": ["--print_config", "--data.init_args.train={path}"],
}


@pytest.mark.parametrize("case", NOT_NAMED)
def test_only_the_class_itself_in_a_flag_that_takes_one_gives_trust(foreign, case):
    flags = [flag.format(path=foreign, package="foreign_package") for flag in NOT_NAMED[case]]
    with pytest.raises(ConfigError, match="code of another package"), own_classes_only(["preview", *flags]):
        import_object(foreign)
    assert not Path("imported").exists()


NAMED = {
    "data": ["--data", "{path}"],
    "class_path": ["--trainer.strategy.init_args.cluster_environment.class_path={path}"],
    "added callback": ["--trainer.callbacks+={path}"],
    "after a flag without a value": ["--print_config", "--data", "{path}"],
    "list": ["--trainer.logger", "[{path}]"],
    "mapping": ["--trainer", "{{callbacks: [{{class_path: {path}}}]}}"],
}


@pytest.mark.parametrize("case", NAMED)
def test_class_in_a_flag_that_takes_one_gives_trust(foreign, case):
    with own_classes_only(["preview", *(flag.format(path=foreign) for flag in NAMED[case])]):
        assert import_object(foreign).__name__ == "Own"


def test_class_that_a_package_exports_gives_trust(foreign, working_folder):
    init = working_folder / "foreign_package" / "__init__.py"
    init.write_text("from foreign_package.data import Own\n")
    with own_classes_only(["preview", "--data", "foreign_package.Own"]):
        assert import_object("foreign_package.Own").__name__ == "Own"


@pytest.mark.parametrize(
    "command", [*LOOKING, ["fit"], ["validate"], ["test"], ["predict"]], ids=lambda command: command[0]
)
def test_config_does_not_trust_remote_code(recipe, no_loading, capsys, command):
    Path("theirs.yaml").write_text("model: {backbone: {trust_remote_code: true}}\n")
    assert main([*command, *recipe, "--config", "theirs.yaml"]) == 2
    assert f"{TRUST}: true in a config would run code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "trusts"),
    [
        ([f"--{TRUST}", "true"], True),
        ([f"--{TRUST}=true"], True),
        ([f"--{TRUST}", "True"], True),
        ([f"--{TRUST}=false"], False),
        (["--model.backbone", "{trust_remote_code: true}"], False),
        (["--config", f"{TRUST}=true"], False),
        (["--print_config", f"--{TRUST}", "true"], True),
        (["--print_config", f"--{TRUST}=true"], True),
        ([], False),
    ],
)
def test_only_the_flag_itself_gives_trust(args, trusts):
    assert flags_trust_remote_code(["fit", *args]) is trusts


def test_job_gets_the_flag_that_its_user_gave(recipe, capsys):
    command = ["submit", "--dry-run", "--gpus-per-node", "0", *recipe]
    assert main([*command, f"--{TRUST}", "true"]) == 0
    assert f"--{TRUST} true\n" in capsys.readouterr().out
    assert main(command) == 0
    assert TRUST not in capsys.readouterr().out


def test_unpickling_a_checkpoint_is_refused(fit, no_loading, capsys):
    Path("theirs.yaml").write_text("weights_only: false\n")
    assert main([*fit, "--config", "theirs.yaml"]) == 2
    assert "weights_only: false would run code in the checkpoint" in capsys.readouterr().err
