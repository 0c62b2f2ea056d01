"""The repository keeps its promises: the files it lists, no pickle, thin scripts."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / "proxsparse").rglob("*.py"))


def test_the_readme_lists_every_module():
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^  (\w+\.py|\w+/) ", readme, re.MULTILINE))
    top = {p.name for p in (ROOT / "proxsparse").glob("*.py")} - {"__init__.py"}
    assert {name for name in listed if name.endswith(".py")} == top


def test_nothing_loads_pickles():
    for path in MODULES:
        assert not re.search(r"torch\.load|import pickle|np\.load|joblib", path.read_text()), path


@pytest.mark.parametrize("folder", ["end-to-end", "eval", "baseline"])
def test_scripts_only_forward(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert len(path.read_text().splitlines()) <= 20, path


def test_every_module_says_what_it_holds():
    for path in MODULES:
        assert path.read_text().startswith('"""'), path


def test_the_library_does_not_print():
    for path in MODULES:
        if "commands" not in path.parts and path.name not in ("errors.py", "__main__.py"):
            assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path
