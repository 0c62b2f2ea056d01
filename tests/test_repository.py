"""The repository keeps its promises: the files it lists, no pickle, thin scripts."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / "proxsparse").rglob("*.py"))


# From the ground up; a module imports from its own layer's row only within its own package, and else from rows above.
LAYERS = [
    {"errors"},
    {"record"},
    {"operator"},
    {"model"},
    {"text", "mask", "resume", "recipes"},
    {"learning", "baselines", "evaluation", "deploy"},
    {"commands"},
    {"__main__"},
]


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports_of(path):
    """Modules of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("proxsparse."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("proxsparse."))


def test_layers_import_downwards_only():
    for path in MODULES:
        own = path.relative_to(ROOT / "proxsparse").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for used in imports_of(path):
            assert used == own or layer(used) < layer(own), f"{path} imports proxsparse.{used}"


def test_the_top_of_the_package_has_few_names():
    names = {p.stem for p in (ROOT / "proxsparse").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert names - {"__init__"} == set().union(*LAYERS)
    assert len(names) <= 15


def test_files_and_functions_are_short():
    for path in MODULES:
        text = path.read_text()
        assert len(text.splitlines()) <= 350 or path.name == "cpu.py", path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and path.name != "cpu.py":
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_every_file_of_a_run_is_named_in_one_module():
    for name in (
        "run.json",
        "mask.safetensors",
        "history.json",
        "blocks.json",
        "input_norms.safetensors",
        "zeros.json",
    ):
        naming = [p for p in MODULES if f'"{name}"' in p.read_text()]
        assert len(naming) == 1, (name, naming)
    scripts = "".join(p.read_text() for p in (ROOT / "script").glob("*.sh"))
    assert not re.search(r"run\.json|mask\.safetensors|_lr\$|_len\$", scripts)


def test_messages_below_the_commands_name_settings_and_no_flags():
    for path in MODULES:
        if "commands" in path.parts or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                texts = [
                    n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                assert not any(re.search(r"(^|\s)--[a-z]", text) for text in texts), (path, texts)


def test_nothing_loads_pickles():
    for path in MODULES:
        unsafe = r"torch\.load|import pickle|np\.load\((?!.*allow_pickle=False)|joblib"
        assert not re.search(unsafe, path.read_text()), path


@pytest.mark.parametrize("folder", ["end-to-end", "eval", "baseline"])
def test_scripts_only_forward(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert len(path.read_text().splitlines()) <= 20, path


def test_every_module_says_what_it_holds():
    for path in MODULES:
        assert path.read_text().startswith('"""'), path


def test_the_library_does_not_print():
    for path in MODULES:
        if "commands" not in path.parts and path.name != "__main__.py":
            assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path
