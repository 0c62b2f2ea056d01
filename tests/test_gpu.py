"""On a real GPU: learning gives the mask of the CPU, and a model with sparse weights computes what the dense one does.

The kernels themselves are compared with their references on a GPU by test_prox_op, test_rounding and test_adafactor.
"""

import pytest
import torch
from conftest import tiny_llama
from test_rehearsal import CASES, SETTINGS, small_model, trainer

from proxsparse.commands.bench import StaticDecoding
from proxsparse.deploy.sparse import use_dense, use_semi_structured
from proxsparse.deploy.timing import recorded
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import top2_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("name", "places"), CASES, ids=str)
def test_a_gpu_learns_the_mask_of_the_cpu_but_for_ties(tmp_path, name, places):
    small_model().save_pretrained(tmp_path / "saved")
    masks = []
    for device in ("cpu", "cuda"):
        model = small_model()
        model.config._name_or_path = str(tmp_path / "saved")
        runs = trainer(tmp_path / device, device, model, **SETTINGS[name][0], **(places if device == "cuda" else {}))
        runs.train()
        masks.append(runs.mask().tensors)
    want, found = masks
    assert found.keys() == want.keys()
    same = [found[weight].cpu() == want[weight].cpu() for weight in want]
    assert torch.cat([s.flatten() for s in same]).double().mean() >= 0.99


def test_bfloat16_autocast_learns_by_default():
    assert ProxSparseConfig(output_dir="unused").bf16


def test_sparse_weights_compute_what_dense_ones_do_and_come_back_bit_for_bit(monkeypatch):
    monkeypatch.setattr("proxsparse.deploy.sparse.WORTHWHILE", 0.0)  # convert whatever its gain
    model = tiny_llama(hidden_size=256, intermediate_size=512).to("cuda", torch.bfloat16).eval()
    targets = find_prunable(model)
    for target in targets:
        target.weight.data.mul_(top2_mask(target.weight))
    before = {target.name: target.weight.detach().clone() for target in targets}
    ids = torch.randint(1, 257, (1, 16), device="cuda")
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        for tokens in (1, 16):
            assert use_semi_structured(model, tokens) == {"sparse": len(targets), "dense": 0}
            difference = (model(input_ids=ids).logits - dense).float()
            assert difference.norm() < 0.02 * dense.float().norm()  # sums in another order, rounded to bfloat16
    use_dense(model)
    assert all(torch.equal(target.weight, before[target.name]) for target in find_prunable(model))


@torch.no_grad()
def test_a_recorded_step_decodes_what_the_step_decodes():
    model = tiny_llama(hidden_size=256, intermediate_size=512).to("cuda").eval()
    decoding = StaticDecoding(model, torch.tensor([[7]], device="cuda"), 9)
    replay, tokens = recorded(decoding.step), []
    for step in (decoding.step, replay):
        found: list[int] = []
        decoding.run(lambda step=step, found=found: (step(), found.append(decoding.token.item())))
        tokens.append(found)
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1
