"""Input norms are measured once per run folder."""

import pytest
import torch
from conftest import tiny_llama

from proxsparse.errors import UsageError
from proxsparse.model.inputs import stored_norms
from proxsparse.model.prunable import find_prunable

WINDOWS = torch.arange(64).view(2, 32)


def test_norms_of_a_file_come_in_the_order_in_which_they_were_measured(tmp_path):
    """A process that starts late reads them while the others have measured, and norms are sent one after the other."""
    model, path = tiny_llama(), tmp_path / "norms.safetensors"
    targets = find_prunable(model)[::-1]
    measured = stored_norms(path, model, targets, WINDOWS)
    read = stored_norms(path, model, targets, WINDOWS)
    assert list(measured) == list(read) == [target.name for target in targets]
    assert all(torch.equal(measured[name], read[name]) for name in measured)


def test_a_file_of_other_norms_is_refused_in_a_sentence(tmp_path):
    model, path = tiny_llama(), tmp_path / "norms.safetensors"
    targets = find_prunable(model)
    stored_norms(path, model, targets[:3], WINDOWS)
    with pytest.raises(UsageError, match="measured for other weights: give another `output_dir`"):
        stored_norms(path, model, targets, WINDOWS)
    with pytest.raises(UsageError, match="measured on another text"):
        stored_norms(path, model, targets, WINDOWS + 1)
    model.config._name_or_path = "another"
    with pytest.raises(UsageError, match="measured on another model"):
        stored_norms(path, model, targets, WINDOWS)
