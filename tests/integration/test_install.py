"""Installed as a wheel and as an editable, from a folder with a ``datamodules/`` and ``cli_configs/`` of its own."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SNIPPET = """
import json, sys
import gatera_lightning, gatera_lightning.datamodules, gatera_lightning.cli_configs
from pathlib import Path
from gatera_lightning.cli.lightning_cli import find_config
from gatera_lightning.datamodules import CommonsenseDataModule

configs = [find_config(name) for name in ("quickstart.yaml", "llama_commonsense.yaml", "overlays/fsdp.yaml", "lora.yaml")]
assert all("Purpose" in Path(path).read_text() for path in configs)
data = CommonsenseDataModule(template="plain", answer_format="content", train_on="response")
assert data.problems("fit") == data.problems("test") == []
rows = {split: sum(1 for _ in data.examples(split)) for split in ("train", "validation", "test")}
print(json.dumps({
    "rows": rows,
    "configs": configs,
    "modules": [m.__file__ for m in (gatera_lightning, gatera_lightning.datamodules, gatera_lightning.cli_configs)],
    "typed": (Path(gatera_lightning.__file__).parent / "py.typed").is_file(),
    "shadowed": [name for name in ("datamodules", "cli_configs") if name in sys.modules],
}))
"""


def run(*command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the tree keeps no build folder."""
    root = tmp_path_factory.mktemp("wheel")
    left_out = (
        ".git",
        ".venv",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
        "runs",
        "shared",
    )
    shutil.copytree(ROOT, root / "source", ignore=shutil.ignore_patterns(*left_out))
    run(
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(root),
        str(root / "source"),
    )
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture
def foreign_folder(tmp_path):
    for name in ("datamodules", "cli_configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the folder of the user')\n")
    (tmp_path / "cli_configs" / "quickstart.yaml").write_text("nonsense: true\n")
    return tmp_path


def look(folder, **env):
    """What Python sees from a folder; the copy of the source tree is not on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return json.loads(run("-c", SNIPPET, cwd=folder, env=environment | env).splitlines()[-1])


def test_the_wheel_holds_every_config_and_sample_and_no_test(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for top in ("cli_configs", "datamodules", "gatera_lightning"):
        target = "gatera_lightning" if top == "gatera_lightning" else f"gatera_lightning/{top}"
        for path in (ROOT / top).rglob("*"):
            if (
                path.suffix in (".py", ".yaml", ".json", ".jsonl", ".typed")
                and "__pycache__" not in path.parts
            ):
                assert f"{target}/{path.relative_to(ROOT / top)}" in names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"gatera_lightning"}
    assert not [name for name in names if "test_" in name or "benchmark" in name or "__pycache__" in name]


def test_the_wheel_works_from_a_foreign_folder(wheel, foreign_folder, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    seen = look(foreign_folder, PYTHONPATH=str(site))
    assert seen["rows"] == {"train": 558, "validation": 85, "test": 144}
    assert all(Path(path).is_relative_to(site) for path in seen["modules"] + seen["configs"])
    assert seen["typed"]
    assert seen["shadowed"] == []


def test_the_editable_install_works_from_a_foreign_folder(foreign_folder):
    seen = look(foreign_folder)
    assert seen["rows"] == {"train": 558, "validation": 85, "test": 144}
    assert not any(Path(path).is_relative_to(foreign_folder) for path in seen["modules"] + seen["configs"])
    assert seen["shadowed"] == []


def test_the_command_is_installed(foreign_folder):
    program = Path(sys.executable).with_name("gatera-lightning")
    done = subprocess.run(
        [program, "--help"], cwd=foreign_folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "fit" in done.stdout
