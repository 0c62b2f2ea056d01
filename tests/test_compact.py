"""The compact store of N:M weights, and the products with it."""

import json
import shutil

import numba
import pytest
import torch
from conftest import slow, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_prunable import FAMILIES, build
from torch import nn

import proxsparse
from proxsparse.deploy import compact_linear, decode_loops, dense
from proxsparse.deploy.check import check_sparsity
from proxsparse.deploy.dense import save_pruned
from proxsparse.deploy.sparse import CompactLinear, use_compact
from proxsparse.errors import RunError, UsageError
from proxsparse.mask import Mask, apply_mask
from proxsparse.model.compact import (
    compress,
    decompress,
    dequantise,
    pack_positions,
    pattern_of,
    quantise_rows,
    unpack_positions,
)
from proxsparse.model.loading import load_model
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern
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


def pruned_linear(inputs, outputs, dtype=torch.float32, bias=False, seed=0, pattern=TWO_OF_FOUR):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(pattern.mask(linear.weight.float().abs()))
    return linear


PATTERNS = [Pattern.parse(text) for text in ("1:2", "1:4", "2:4", "3:4", "1:8", "4:8", "6:8", "8:16", "11:16")]
blocks = st.lists(
    st.tuples(st.permutations(range(4)), st.floats(-4, 4, width=16), st.floats(-4, 4, width=16)), min_size=1, max_size=9
)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@given(blocks, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_compression_is_exact_whatever_the_block(found, dtype):
    rows = torch.zeros(1, 4 * len(found), dtype=dtype)
    for i, (order, a, b) in enumerate(found):
        rows[0, 4 * i + order[0]], rows[0, 4 * i + order[1]] = a, b
    values, positions = compress(rows)
    packed = pack_positions(positions)
    assert packed.shape[-1] == -(-positions.shape[-1] // 4)
    assert torch.equal(unpack_positions(packed, rows.shape[-1]), positions)
    assert torch.equal(bits(decompress(values, positions)), bits(rows))  # kept entries of -0.0 as well


def test_a_weight_that_is_not_24_is_refused():
    with pytest.raises(ValueError, match="more than two non-zeros"):
        compress(torch.ones(2, 8))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_zeros_of_a_weight_tell_its_pattern_and_the_compact_form_gives_it_back(pattern):
    for shape in ((5, 3 * pattern.m), (2, 3, 4 * pattern.m)):
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        rows[~pattern.mask(rows.abs())] = 0
        assert pattern_of(rows) == pattern
        rows.view(-1)[0] = 0  # perhaps a block with one fewer
        rows.view(-1)[rows.view(-1).nonzero()[-1]] = -0.0  # kept
        assert pattern_of(rows) == pattern
        values, positions = compress(rows, pattern)
        packed = pack_positions(positions, pattern)
        assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
        assert torch.equal(unpack_positions(packed, shape[-1], pattern), positions)
        assert torch.equal(bits(decompress(values, positions, pattern)), bits(rows))
        with pytest.raises(ValueError, match="non-zeros"):
            compress(torch.ones(shape), pattern)


def test_dense_and_empty_weights_have_no_pattern():
    assert pattern_of(torch.ones(3, 16)) is None
    assert pattern_of(torch.zeros(3, 16)) is None
    assert pattern_of(torch.ones(3, 6) * torch.tensor([1, 0, 1, 0, 1, 1])) is None
    assert pattern_of(torch.ones(0, 16)) is None
    assert pattern_of(torch.ones(3, 16) * (torch.arange(16) != 5)) is None  # 15:16 would not be smaller


def test_the_bytes_of_the_files_stay_as_they_are():
    positions = torch.tensor([[0, 1, 2, 3, 1, 3]], dtype=torch.uint8)
    assert pack_positions(positions).tolist() == [[228, 13]]
    positions = torch.tensor([[0, 1, 2, 7, 3, 4, 5, 6]], dtype=torch.uint8)
    assert pack_positions(positions, Pattern.parse("4:8")).tolist() == [[0b10000111, 0b01111000]]
    positions = torch.tensor([[3, 0, 2]], dtype=torch.uint8)
    assert pack_positions(positions, Pattern.parse("1:4")).tolist() == [[0b00011000, 0b00000100]]


@pytest.fixture(params=["AVX2", slow("any processor")])
def processor(request, monkeypatch):
    if request.param == "AVX2" and not decode_loops.has_shuffles():
        pytest.skip("needs a processor with AVX2")
    monkeypatch.setattr(decode_loops, "has_shuffles", lambda: request.param == "AVX2")


any_product = given(
    st.integers(1, 70), st.integers(1, 30), st.integers(1, 11), st.booleans(), st.sampled_from(PATTERNS)
)
few_examples = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few_examples
@any_product
def test_the_kernel_is_the_dense_product(processor, outputs, blocks_in, tokens, half, pattern):
    inputs = torch.randn(tokens, pattern.m * blocks_in)
    linear = pruned_linear(inputs.shape[1], outputs, torch.bfloat16 if half else torch.float32, pattern=pattern)
    compact = CompactLinear(linear, pattern=pattern)
    assert torch.equal(compact.dense(), linear.weight)
    wanted = inputs.double() @ linear.weight.double().T
    torch.testing.assert_close(compact(inputs).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("pattern", [Pattern.parse(text) for text in ("2:4", "4:8", "8:16")], ids=str)
def test_wide_weights_and_inputs_of_any_kind_are_multiplied(pattern, plain, monkeypatch):
    monkeypatch.setattr("proxsparse.deploy.decode.AT_ONCE", 16 * 40 * 5)  # tokens in two parts
    if plain:
        monkeypatch.setattr(decode_loops, "has_shuffles", lambda: False)
    linear = pruned_linear(16 * 40, 33, pattern=pattern)
    compact = CompactLinear(linear, pattern=pattern)
    inputs = torch.randn(640, 7).T
    for given_inputs in (
        inputs,
        inputs.double(),
        inputs.half(),
        inputs[:, :, None].expand(-1, -1, 2)[..., 1],
        inputs[:0],
    ):
        wanted = given_inputs.double() @ linear.weight.double().T
        tolerance = 2e-3 if given_inputs.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(compact(given_inputs).double(), wanted, rtol=tolerance, atol=tolerance)


def test_each_layer_is_compact_by_its_own_zeros():
    model = tiny_llama()
    up, down, q, k = (
        model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.down_proj, model.model.layers[0].self_attn.q_proj,
        model.model.layers[1].self_attn.k_proj,
    )  # fmt: skip
    with torch.no_grad():
        for linear, text in ((up, "2:4"), (down, "4:8")):
            linear.weight.mul_(Pattern.parse(text).mask(linear.weight.abs()))
        q.weight.mul_(torch.rand(q.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.9)  # unstructured
        k.weight.zero_()
    assert use_compact(model) == 2
    assert str(model.model.layers[0].mlp.up_proj.panels.pattern) == "2:4"
    assert str(model.model.layers[1].mlp.down_proj.panels.pattern) == "4:8"
    unstructured = tiny_llama()
    with torch.no_grad():
        for target in find_prunable(unstructured):
            target.weight.mul_(torch.rand_like(target.weight) < 0.8)
    with pytest.raises(UsageError, match="no linear layer is N:M"):
        use_compact(unstructured)


def test_rows_that_are_sparser_than_the_rest_do_not_mislead(monkeypatch):
    monkeypatch.setattr("proxsparse.deploy.sparse.FIRST_ROWS", 4)
    model = tiny_llama()
    linear = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        linear.weight.mul_(TWO_OF_FOUR.mask(linear.weight.abs()))
        linear.weight[:4].mul_(Pattern.parse("1:4").mask(linear.weight[:4].abs()))
    assert use_compact(model) == 1
    assert model.model.layers[0].mlp.up_proj.panels.pattern == TWO_OF_FOUR


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compact_linear_stands_in_for_a_linear(tokens, dtype):
    linear = pruned_linear(64, 48, dtype, bias=True)
    inputs = torch.randn(2, tokens, 64, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        torch.testing.assert_close(CompactLinear(linear)(inputs), linear(inputs), rtol=tolerance, atol=tolerance)


def test_a_backward_pass_says_that_there_is_none():
    linear = pruned_linear(16, 8)
    inputs = torch.randn(3, 16, requires_grad=True)
    out = CompactLinear(linear)(inputs)
    torch.testing.assert_close(out, linear(inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(RunError, match="no gradients: to train, load the model without `sparse=True`"):
        out.sum().backward()


def test_it_has_the_bytes_it_promises():
    compact = CompactLinear(pruned_linear(1024, 1024, torch.bfloat16))
    assert compact.nbytes == 0.5625 * 1024 * 1024 * 2
    small = CompactLinear(pruned_linear(1024, 1024, torch.bfloat16), "int8")
    assert small.nbytes <= 0.3125 * 1024 * 1024 * 2 + 8 * 1024  # two numbers per row


def dequantised(linear, pattern=TWO_OF_FOUR):
    """The weight that int8 values stand for, in float64."""
    values, positions = compress(linear.weight.detach(), pattern)
    codes, scales = quantise_rows(values)
    return decompress(codes.double() * scales.double()[:, None], positions, pattern)


@few_examples
@any_product
def test_int8_values_compute_with_the_rounded_weight(processor, outputs, blocks_in, tokens, half, pattern):
    inputs = torch.randn(tokens, pattern.m * blocks_in)
    linear = pruned_linear(inputs.shape[1], outputs, torch.bfloat16 if half else torch.float32, pattern=pattern)
    compact, weight = CompactLinear(linear, "int8", pattern), dequantised(linear, pattern)
    torch.testing.assert_close(compact(inputs).double(), inputs.double() @ weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compact.dense().double(), weight, rtol=2.0**-8 if half else 1e-6, atol=0)
    assert not compact.dense()[linear.weight == 0].any()


def test_a_processor_that_numba_is_told_to_compile_for_counts(monkeypatch):
    for features, wanted in (("", False), ("+sse4.2,-avx2", False), ("+avx2,-fma", False), ("+avx2,+fma", True)):
        monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
        assert decode_loops.has_shuffles() is wanted


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_products_show_what_is_not_finite(processor, quantize):
    linear = pruned_linear(64, 8)
    with torch.no_grad():
        linear.weight[:, 4:8] = torch.tensor([0.0, 1.0, 2.0, 0.0])
    compact = CompactLinear(linear, quantize)
    inputs = torch.randn(3, 64)
    inputs[0, 5], inputs[1, 6] = float("nan"), float("inf")
    assert [bool(row.isfinite().all()) for row in compact(inputs)] == [False, False, True]
    assert not compact(torch.zeros(1, 64)).any()


def test_codes_are_off_by_half_a_step():
    values = torch.randn(50, 300, generator=torch.manual_seed(0))
    values[3] = 0
    codes, scales = quantise_rows(values)
    torch.testing.assert_close(scales[:3], values[:3].abs().amax(1) / 127)
    assert ((codes * scales[:, None] - values).abs() <= 0.50001 * scales[:, None]).all()
    assert codes.abs().amax(1).tolist() == [127 if row != 3 else 0 for row in range(50)]
    with pytest.raises(ValueError, match="not finite"):
        quantise_rows(torch.tensor([[1.0, float("nan")]]))


def test_values_of_int8_that_are_read_are_rounded_to_the_same_ones():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codes, scales = quantise_rows(torch.randn(50, 300, generator=torch.manual_seed(1)).to(dtype))
        again = quantise_rows(dequantise(codes, scales, dtype))
        assert torch.equal(again[0], codes)
        torch.testing.assert_close(again[1], scales, rtol=1e-6, atol=0)


def test_panels_of_a_large_weight_are_expanded_one_after_the_other(monkeypatch):
    linear, inputs = pruned_linear(64, 150, bias=True), torch.randn(20, 64)
    monkeypatch.setattr(compact_linear, "BUFFER", 64 * 70)
    monkeypatch.setattr(compact_linear, "ROWS", 1)
    for wide in (torch.float32, torch.bfloat16):
        for quantize in (None, "int8"):
            compact = CompactLinear(linear, quantize)
            monkeypatch.setattr(compact, "wide", wide)
            monkeypatch.setattr(compact, "few", 12)
            weight = dequantised(linear) if quantize else linear.weight.double()
            wanted = inputs.double() @ weight.T + linear.bias.double()
            tolerance = 3e-2 if wide == torch.bfloat16 else 1e-3
            torch.testing.assert_close(compact(inputs).double(), wanted, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(compact.dense().double(), weight, rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("text", ["1:4", "4:8", "8:16"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_other_patterns_are_written_read_and_computed(tmp_path, checkpoint, text, quantize):
    pattern, model = Pattern.parse(text), load_model(checkpoint).eval()
    kept = {t.name: pattern.mask(t.rows(t.weight.detach()).float().abs()) for t in find_prunable(model)}
    mask = Mask(kept, pattern)
    for form, base in (("files", checkpoint), ("memory", tiny_llama())):
        save_pruned(base, mask, tmp_path / form, form="compact", quantize=quantize)
    apply_mask(model, mask)
    ids = torch.arange(1, 20)[None]
    for form in ("files", "memory"):
        again = load_compact(tmp_path / form).eval()
        if quantize is None:
            assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
        with torch.no_grad():
            dense = again(input_ids=ids).logits
            sparse = proxsparse.load(str(tmp_path / form), sparse=True)
            assert sparse.model.layers[0].mlp.up_proj.panels.pattern == pattern
            torch.testing.assert_close(sparse(input_ids=ids).logits, dense, rtol=1e-4, atol=1e-4)
    assert check_sparsity(str(tmp_path / "files"), pattern=pattern)[1] == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_compact_folder_of_int8_values_gives_the_rounded_weights(family, tokenizer, tmp_path):
    model = prune(build(family)).to(torch.bfloat16)
    pruned = {t.name: t.in_dim for t in find_prunable(model)}
    save_pruned(model, Mask(magnitudes(model)), tmp_path / "out", form="compact", quantize="int8", tokenizer=tokenizer)
    again = load_compact(tmp_path / "out").state_dict()
    for name, weight in model.state_dict().items():
        if name not in pruned:
            assert torch.equal(again[name], weight)
            continue
        step = weight.float().abs().amax(pruned[name] if weight.dim() == 2 else -1, keepdim=True) / 127
        off = (again[name].float() - weight.float()).abs()
        assert again[name].dtype == weight.dtype
        assert (off <= 0.51 * step + again[name].float().abs() * 2.0**-8).all()
        assert not again[name][weight == 0].view(torch.int16).any()
    assert check_sparsity(str(tmp_path / "out"))[1] == []


def test_wrong_folders_and_models_are_one_sentence(tmp_path, tokenizer):
    model = tiny_llama()
    with pytest.raises(UsageError, match="with an M of 2, 4, 8 or 16, and an N of .*; not 3:5"):
        save_pruned(model, Mask(magnitudes(model), "3:5"), tmp_path / "dense", form="compact")
    assert not (tmp_path / "dense").exists()
    with pytest.raises(UsageError, match=r"`quantize` of compact weights must be int8; got 'fp8'\."):
        use_compact(prune(tiny_llama()), "fp8")
    with pytest.raises(UsageError, match="can't be made compact: no linear layer is N:M"):
        use_compact(tiny_llama())


def test_patterns_that_older_versions_wrote_are_still_read(tmp_path, monkeypatch):
    model = tiny_llama()
    mask = Mask({t.name: Pattern(7, 8).mask(t.weight.detach().abs()) for t in find_prunable(model)}, Pattern(7, 8))
    with pytest.raises(UsageError, match="an N of at most three quarters of it; not 7:8"):
        save_pruned(model, mask, tmp_path / "out", form="compact")
    monkeypatch.setattr(dense, "check_pattern", lambda pattern: None)
    save_pruned(model, mask, tmp_path / "out", form="compact")
    apply_mask(model, mask)
    again = load_compact(tmp_path / "out")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


def edit_index(folder, **changes):
    index = json.loads((folder / "compact.json").read_text())
    (folder / "compact.json").write_text(json.dumps(index | changes))


def edit_weight(folder, **changes):
    index = json.loads((folder / "compact.json").read_text())
    name = next(iter(index["weights"]))
    edit_index(folder, weights=index["weights"] | {name: index["weights"][name] | changes})


def cut_positions(folder):
    tensors = load_file(folder / "compact.safetensors")
    name = next(name for name in tensors if name.endswith(".positions"))
    save_file(tensors | {name: tensors[name][:1].clone()}, folder / "compact.safetensors")


def test_damage_is_noticed(tmp_path, tokenizer):
    save_compact(prune(tiny_llama()), tokenizer, tmp_path / "good")
    for name, damage in {
        "index": lambda folder: (folder / "compact.json").write_text("{}"),
        "format": lambda folder: (folder / "compact.json").write_text('{"format": "other", "weights": {}}'),
        "cut": lambda folder: (folder / "compact.safetensors").write_bytes(
            (folder / "compact.safetensors").read_bytes()[:5000]
        ),
        "gone": lambda folder: (folder / "compact.safetensors").unlink(),
        "pattern": lambda folder: edit_index(folder, format="proxsparse-compact-nm-1", pattern="3:5"),
        "no pattern": lambda folder: edit_index(folder, format="proxsparse-compact-nm-1", pattern="foo"),
        "bits": lambda folder: edit_index(folder, format="proxsparse-compact-nm-1", pattern="4:8"),
        "no rows": lambda folder: edit_weight(folder, rows=[]),
        "half a row": lambda folder: edit_weight(folder, rows=[8, 64.5]),
        "no blocks": lambda folder: edit_weight(folder, rows=[64, 30]),
        "dimension": lambda folder: edit_weight(folder, in_dim=9),
        "positions": lambda folder: cut_positions(folder),
    }.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        damage(folder)
        with pytest.raises((RunError, UsageError), match=r"damaged|has format|lacks"):
            load_compact(folder)
