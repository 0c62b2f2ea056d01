"""The compact 2:4 store and the products with it."""

import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_prunable import FAMILIES, build
from torch import nn

from proxsparse.deploy import decode
from proxsparse.deploy.dense import save_pruned
from proxsparse.deploy.sparse import CompactLinear, use_compact
from proxsparse.errors import RunError, UsageError
from proxsparse.mask import Mask, apply_mask
from proxsparse.model.compact import compress, decompress, pack_positions, unpack_positions
from proxsparse.model.loading import load_model
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import top2_mask


def magnitudes(model):
    return {t.name: top2_mask(t.rows(t.weight.detach()).float()) for t in find_prunable(model)}


def prune(model):
    apply_mask(model, Mask(magnitudes(model)))
    return model


def save_compact(model, tokenizer, folder):
    """A model that was never on disk, in the compact form."""
    save_pruned(model, Mask(magnitudes(model)), folder, form="compact", tokenizer=tokenizer)


def load_compact(folder):
    return load_model(str(folder))


def pruned_linear(inputs, outputs, dtype=torch.float32, bias=False, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(top2_mask(linear.weight.float()))
    return linear


blocks = st.lists(
    st.tuples(st.permutations(range(4)), st.floats(-4, 4, width=16), st.floats(-4, 4, width=16)), min_size=1, max_size=9
)


@given(blocks, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_compression_is_exact_whatever_the_block(found, dtype):
    rows = torch.zeros(1, 4 * len(found), dtype=dtype)
    for i, (order, a, b) in enumerate(found):
        rows[0, 4 * i + order[0]], rows[0, 4 * i + order[1]] = a, b
    values, positions = compress(rows)
    packed = pack_positions(positions)
    assert packed.shape[-1] == -(-positions.shape[-1] // 4)
    assert torch.equal(unpack_positions(packed, positions.shape[-1]), positions)
    assert torch.equal(decompress(values, positions), rows)


def test_a_weight_that_is_not_24_is_refused():
    with pytest.raises(ValueError, match="more than two non-zeros"):
        compress(torch.ones(2, 8))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 30), st.integers(1, 8), st.booleans())
def test_the_kernel_is_the_dense_product(outputs, blocks_in, tokens, half):
    linear = pruned_linear(4 * blocks_in, outputs, torch.bfloat16 if half else torch.float32)
    compact = CompactLinear(linear)
    assert torch.equal(compact.dense(), linear.weight)
    inputs = torch.randn(tokens, 4 * blocks_in)
    wanted = inputs.double() @ linear.weight.double().T
    found = compact(inputs)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compact_linear_stands_in_for_a_linear(tokens, dtype):
    linear = pruned_linear(64, 48, dtype, bias=True)
    inputs = torch.randn(2, tokens, 64, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        torch.testing.assert_close(CompactLinear(linear)(inputs), linear(inputs), rtol=tolerance, atol=tolerance)


def test_it_has_the_bytes_it_promises():
    compact = CompactLinear(pruned_linear(1024, 1024, torch.bfloat16))
    assert compact.nbytes == 0.5625 * 1024 * 1024 * 2
    assert isinstance(compact.values, np.ndarray)
    assert compact.values.shape[-1] == decode.PANEL


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compact_folder_gives_the_model_back_bit_for_bit(family, tmp_path, tokenizer):
    model = prune(build(family)).eval()
    save_compact(model, tokenizer, tmp_path / "compact")
    again = load_compact(tmp_path / "compact")
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_shards_may_part_values_from_positions(tmp_path, tokenizer):
    model = prune(tiny_llama()).eval()
    model.generation_config.eos_token_id = [0, 7]
    save_compact(model, tokenizer, tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "compact.safetensors")
    (tmp_path / "one" / "compact.safetensors").unlink()
    for part in ("positions", "values"):
        mine = {name: tensor for name, tensor in tensors.items() if name.endswith("positions") == (part == "positions")}
        save_file(mine, tmp_path / "one" / f"compact-{part}.safetensors")
    again = load_compact(tmp_path / "one")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.generation_config.eos_token_id == [0, 7]


def test_a_sparse_model_generates_what_the_dense_one_does(tmp_path, tokenizer):
    model = prune(tiny_llama()).eval()
    ids = torch.tensor([tokenizer("The quick brown").input_ids])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    assert use_compact(model) == 14
    assert isinstance(model.model.layers[0].mlp.up_proj, CompactLinear)
    assert torch.equal(model.generate(ids, **options), wanted)


def test_wrong_folders_and_models_are_one_sentence(tmp_path, tokenizer):
    model = tiny_llama()
    with pytest.raises(UsageError, match="holds 2:4 weights; this mask is 4:8"):
        save_pruned(model, Mask(magnitudes(model), "4:8"), tmp_path / "dense", form="compact")
    assert not (tmp_path / "dense").exists()
    with pytest.raises(UsageError, match="can't be made compact: a block has more than two non-zeros"):
        use_compact(tiny_llama())


def test_damage_is_noticed(tmp_path, tokenizer):
    save_compact(prune(tiny_llama()), tokenizer, tmp_path / "good")
    for name, damage in {
        "index": lambda folder: (folder / "compact.json").write_text("{}"),
        "format": lambda folder: (folder / "compact.json").write_text('{"format": "other", "weights": {}}'),
        "cut": lambda folder: (folder / "compact.safetensors").write_bytes(
            (folder / "compact.safetensors").read_bytes()[:5000]
        ),
        "gone": lambda folder: (folder / "compact.safetensors").unlink(),
    }.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        damage(folder)
        with pytest.raises((RunError, UsageError), match=r"damaged|has format|lacks"):
            load_compact(folder)
