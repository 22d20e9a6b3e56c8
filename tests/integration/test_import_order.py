"""Packages import only those below them in the tree of CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

import gatera_lightning

ROOT = Path(gatera_lightning.__file__).parent
TREE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
ORDER = re.findall(r"^  (\w+)/", TREE.split("\ndatamodules/")[0], re.MULTILINE)


def imported(file):
    """Return the packages of ours that a file imports at the top of a module, a class or a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name.split(".")[1] for name in names if name.startswith("gatera_lightning."))


def test_every_package_is_in_the_tree():
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == {*ORDER, "cli_configs"}


@pytest.mark.parametrize("package", ORDER)
def test_package_imports_only_downwards(package):
    below = {*ORDER[ORDER.index(package) :], "errors", "cli_configs"}
    found = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / package).rglob("*.py")
        for name in imported(file)
        if name not in below
    }
    assert not found
