"""The package works from a wheel, an sdist and the source tree, beside a user's own ``datamodules/``."""

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
from gatera_lightning.cli.shipped_configs import find_config
from gatera_lightning.datamodules import CommonsenseDataModule

names = ("quickstart.yaml", "llama_commonsense.yaml", "overlays/fsdp.yaml", "lora.yaml")
configs = [find_config(name) for name in names]
assert all("Purpose" in Path(path).read_text() for path in configs)
data = CommonsenseDataModule(template="plain", answer_format="content", train_on="response")
assert data.problems("fit") == data.problems("test") == []
rows = {split: sum(1 for _ in data.examples(split)) for split in ("train", "validation", "test")}
modules = (gatera_lightning, gatera_lightning.datamodules, gatera_lightning.cli_configs)
print(json.dumps({
    "rows": rows,
    "configs": configs,
    "modules": [module.__file__ for module in modules],
    "typed": (Path(gatera_lightning.__file__).parent / "py.typed").is_file(),
    "shadowed": [name for name in ("datamodules", "cli_configs") if name in sys.modules],
}))
"""


def run(*command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A wheel built from the source tree, an sdist, and a wheel built from the sdist."""
    root = tmp_path_factory.mktemp("distributions")
    ignored = (".git", ".venv", "build", "dist", "site", "*.egg-info", "__pycache__", ".*_cache", "runs")
    source = shutil.copytree(ROOT, root / "source", ignore=shutil.ignore_patterns(*ignored), symlinks=True)
    build = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(root)!r}))"
    sdist = root / run("-c", build, cwd=source).splitlines()[-1]
    pip_wheel = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w")
    for name, built_from in (("from_source", source), ("from_sdist", sdist)):
        run(*pip_wheel, str(root / name), str(built_from))
    return root


@pytest.fixture(params=["from_source", "from_sdist"])
def wheel(distributions, request):
    (built,) = (distributions / request.param).glob("*.whl")
    return built


@pytest.fixture
def foreign_folder(tmp_path):
    for name in ("datamodules", "cli_configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('this is the user's folder')\n")
    (tmp_path / "cli_configs" / "quickstart.yaml").write_text("nonsense: true\n")
    return tmp_path


def inspect_package(folder, **env):
    """Return what the snippet finds when Python runs in a folder without the source tree on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return json.loads(run("-c", SNIPPET, cwd=folder, env=environment | env).splitlines()[-1])


def test_wheel_contains_configs_and_samples_but_no_tests(wheel):
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


def test_wheel_works_in_foreign_folder(wheel, foreign_folder, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    seen = inspect_package(foreign_folder, PYTHONPATH=str(site))
    assert seen["rows"] == {"train": 558, "validation": 85, "test": 144}
    assert all(Path(path).is_relative_to(site) for path in seen["modules"] + seen["configs"])
    assert seen["typed"]
    assert seen["shadowed"] == []


def test_editable_install_works_in_foreign_folder(foreign_folder):
    seen = inspect_package(foreign_folder)
    assert seen["rows"] == {"train": 558, "validation": 85, "test": 144}
    assert not any(Path(path).is_relative_to(foreign_folder) for path in seen["modules"] + seen["configs"])
    assert seen["shadowed"] == []


def test_command_is_installed(foreign_folder):
    program = Path(sys.executable).with_name("gatera-lightning")
    done = subprocess.run(
        [program, "--help"], cwd=foreign_folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "fit" in done.stdout
