"""The README keeps its promises: its Python runs as it stands, and what it names is there."""

import re
from pathlib import Path

import pytest
import torch

from proxsparse.model.loading import EMBEDDED, load_model
from proxsparse.model.prunable import find_prunable

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return code


def test_the_python_of_the_readme_is_ten_lines_that_compile():
    assert len([line for line in block().splitlines() if line.strip()]) <= 10
    compile(block(), "README.md", "exec")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_python_of_the_readme_prunes_a_model_and_keeps_its_other_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block(), "README.md", "exec"), {})
    pruned, original = load_model("pruned"), load_model(EMBEDDED)
    targets = {target.name: target for target in find_prunable(pruned)}
    for name, before in original.named_parameters():
        after = pruned.get_parameter(name)
        if name in targets:
            kept = after != 0
            assert int(kept.unflatten(-1, (-1, 4)).sum(-1).max()) == 2, name
            torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0)
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_every_package_stands_in_the_readme_s_list_of_files():
    (listed,) = re.findall(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)
    named = {word for line in listed.splitlines() for word in re.split(r"\s{2,}", line)[0].split()}
    assert all((ROOT / name).is_dir() for name in named), named
    packages = {f"proxsparse/{p.parent.name}/" for p in (ROOT / "proxsparse").glob("*/__init__.py")}
    assert packages == {name for name in named if name.startswith("proxsparse/")}


PAGES = ["README.md", "BENCHMARKS.md", "CONTRIBUTING.md", "script/doc.md", "end-to-end/doc.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8")):
        assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), link
