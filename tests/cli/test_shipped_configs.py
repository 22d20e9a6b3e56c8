"""Configs found by name, from any folder."""

import logging
import os
from importlib import resources
from pathlib import Path

import pytest

from gatera_lightning.cli.deprecation import announce_deprecation
from gatera_lightning.cli.shipped_configs import (
    RENAMED_CONFIGS,
    find_config,
    find_configs,
    with_found_configs,
)
from gatera_lightning.errors import ConfigError

SHIPPED = Path(str(resources.files("gatera_lightning.cli_configs")))
ALL = sorted(SHIPPED.rglob("*.yaml"))
(LORA,) = SHIPPED.glob("overlays/**/lora.yaml")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_shipped_config_is_found_by_every_name(path):
    name = path.relative_to(SHIPPED).as_posix()
    names = [name, path.name] + ([f"overlays/{path.name}"] if name.startswith("overlays/") else [])
    assert all(Path(find_config(name)).samefile(path) for name in names)


def test_file_wins_over_shipped_config(working_folder):
    (working_folder / "lora.yaml").write_text("seed_everything: 7\n")
    assert find_config("lora.yaml") == "lora.yaml"
    assert find_config("./lora.yaml") == "./lora.yaml"


def test_folder_does_not_hide_shipped_config(working_folder):
    (working_folder / "lora.yaml").mkdir()
    (working_folder / "cli_configs").mkdir()
    (working_folder / "cli_configs" / "quickstart.yaml").write_text("nonsense")
    assert Path(find_config("quickstart.yaml")) == SHIPPED / "quickstart.yaml"
    assert Path(find_config("lora.yaml")) == LORA


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quickstrat.yaml", "; did you mean 'quickstart.yaml'?"),
        ("lroa.yaml", "; did you mean 'lora.yaml'?"),
        ("x", ""),
    ],
)
def test_unknown_config_names_near_miss_and_shipped_configs(name, hint):
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    shipped = ", ".join(path.relative_to(SHIPPED).as_posix() for path in ALL)
    assert (
        str(caught.value)
        == f"--config: {name!r} is neither a file nor a shipped config{hint}; shipped: {shipped}"
    )


@pytest.mark.parametrize("prefix", ["", "overlays/"])
@pytest.mark.parametrize("old", RENAMED_CONFIGS)
def test_renamed_config_is_found_with_one_warning(old, prefix, caplog):
    new = RENAMED_CONFIGS[old]
    announce_deprecation.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [find_configs(prefix + old) for _ in range(2)] == [[find_config(name) for name in new]] * 2
    assert caplog.messages == [
        f"the config {prefix}{old} is deprecated and will be removed in 0.3; use {' --config '.join(new)}"
    ]


def test_user_file_wins_over_renamed_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "decided_gates.yaml").touch()
    assert find_configs("decided_gates.yaml") == ["decided_gates.yaml"]


@pytest.mark.parametrize(
    "spelling", [["--config", "lora.yaml"], ["--config=lora.yaml"], ["-c", "lora.yaml"]], ids=" ".join
)
def test_every_spelling_of_config_flag_is_found(spelling):
    found = with_found_configs(["fit", *spelling, "--model.adapter.rank", "4"])
    assert found == ["fit", "--config", str(LORA), "--model.adapter.rank", "4"]


def test_configs_move_before_flags(working_folder):
    (working_folder / "mine.yaml").touch()
    found = with_found_configs(["fit", "--seed_everything", "3", "-c", "quickstart.yaml", "-c", "mine.yaml"])
    assert found == [
        *("fit", "--config", str(SHIPPED / "quickstart.yaml"), "--config", "mine.yaml"),
        *("--seed_everything", "3"),
    ]


def test_config_that_is_no_readable_text_is_refused(working_folder):
    (working_folder / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    (working_folder / "utf16.yaml").write_text("a: 1\n", encoding="utf-16")
    (working_folder / "folder.yaml").mkdir()
    os.mkfifo(working_folder / "fifo.yaml")
    for name, message in {
        "latin.yaml": "'latin.yaml', line 2: the byte 0xe9 is not UTF-8",
        "utf16.yaml": "'utf16.yaml', line 1: the byte 0xff is not UTF-8",
        "folder.yaml": "'folder.yaml' is a folder; accepted: a YAML file",
        "fifo.yaml": "'fifo.yaml' is no regular file; accepted: a YAML file",
    }.items():
        with pytest.raises(ConfigError, match=f"^--config: {message}"):
            find_config(name)
