"""What Python callers may mix up is one sentence; what they pass comes back as it was."""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from tiny_models import tiny_model
from torch import nn
from transformers import LlamaForSequenceClassification, LlamaModel, T5Config, T5ForConditionalGeneration

import proxsparse
from proxsparse.baselines import maskllm
from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.baselines.wanda import Wanda
from proxsparse.errors import UsageError
from proxsparse.evaluation.perplexity import perplexity
from proxsparse.mask import Mask, apply_mask, mask_of_pruned
from proxsparse.model.inputs import input_norms
from proxsparse.model.loading import load_model, load_tokenizer
from proxsparse.model.ordering import order_channels
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern
from proxsparse.text import calibration_windows, evaluation_windows

WINDOWS = torch.randint(1, 257, (4, 16), generator=torch.Generator().manual_seed(0))
PLAIN = {"bf16": False, "layer_rate": 0.0}


def learn(model, windows=WINDOWS, **settings):
    return proxsparse.learn_mask(model, byte_tokenizer(), windows, **PLAIN | settings)


def on_meta():
    with torch.device("meta"):
        return tiny_llama()


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=257, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def with_adapters():
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear"))
    return model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (on_meta, "on the device meta"),
        (lambda: LlamaModel(tiny_llama().config), "must be a causal language model.*got LlamaModel"),
        (lambda: LlamaForSequenceClassification(tiny_llama().config), "got LlamaForSequenceClassification"),
        (t5, "got T5ForConditionalGeneration"),
        (lambda: nn.DataParallel(tiny_llama()), "as load_model returns it; got DataParallel"),
        (with_adapters, "has adapters"),
        (lambda: None, "got NoneType"),
    ],
)
def test_what_is_no_language_model_is_refused(make, sentence):
    with pytest.raises(UsageError, match=sentence):
        learn(make())


@pytest.mark.parametrize(
    "windows",
    [WINDOWS.float(), WINDOWS[:, :1], WINDOWS.to_sparse(), WINDOWS.to("meta"), WINDOWS.tolist(), WINDOWS[0], None],
)
def test_what_is_no_windows_is_refused(windows):
    for use in (learn, perplexity):
        with pytest.raises(UsageError, match="`windows` must be an int64 tensor of token ids"):
            use(tiny_llama(), windows)
    with pytest.raises(UsageError, match="has embeddings for 257 tokens"):
        perplexity(tiny_llama(), WINDOWS + 257)
    for use in (learn, perplexity):
        with pytest.raises(UsageError, match="have 129 tokens each, and this model has 128 positions"):
            use(tiny_llama(), torch.ones(1, 129, dtype=torch.int64))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"bf16": "auto"}, "`bf16` must be True or False; got 'auto'"),
        ({"masked_forward": "false"}, "`masked_forward` must be True or False; got 'false'"),
        ({"optim_in_backward": "no"}, "`optim_in_backward` must be True or False; got 'no'"),
        ({"pattern": None}, "`pattern` must be N:M with N < M, as 2:4 or 4:8; got None"),
        ({"pattern": 5}, "`pattern` must be N:M with N < M, as 2:4 or 4:8; got 5"),
        ({"include": 5}, "`include` must be a regular expression; got 5"),
        ({"exclude": ["a"]}, r"`exclude` must be a regular expression; got \['a'\]"),
        ({"batch_size": 2}, "unexpected keyword argument 'batch_size'"),
        ({"max_length": 10}, "multiple values for keyword argument 'max_length'"),
        ({"eval_on_start": True}, "`eval_on_start=True` needs samples to evaluate on"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 5}, "drops all of the 4 samples"),
        ({"neftune_noise_alpha": -1.0}, "`neftune_noise_alpha` must be a finite number > 0; got -1.0"),
        ({"torch_compile_mode": "foo"}, "`torch_compile_mode` must be one of default, .*; got 'foo'"),
    ],
)
def test_a_setting_that_can_not_be_is_one_sentence(setting, sentence):
    with pytest.raises(UsageError, match=sentence):
        learn(tiny_llama(), **setting)


def test_what_is_wrapped_can_be_measured_and_is_not_learned():
    model, peft = tiny_llama(), pytest.importorskip("peft")
    want = perplexity(model, WINDOWS).perplexity
    compiled = torch.compile(model)
    assert perplexity(compiled, WINDOWS).perplexity == pytest.approx(want)
    assert len(find_prunable(compiled)) == len(find_prunable(model))
    with pytest.raises(UsageError, match="The model is compiled: give the model itself"):
        learn(compiled)
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    for adapted in (wrapped, with_adapters()):
        assert perplexity(adapted, WINDOWS).perplexity == pytest.approx(want)


def test_a_whole_number_may_have_a_point():
    mask = learn(tiny_llama(), gradient_accumulation_steps=2.0)
    assert same(mask, learn(tiny_llama(), gradient_accumulation_steps=2))


def test_gradients_are_computed_wherever_the_caller_is():
    want = learn(tiny_llama(), layer_rate=2.0)
    for switched_off in (torch.no_grad, torch.inference_mode):
        model = tiny_llama()
        with switched_off():
            assert same(learn(model, layer_rate=2.0), want)


def same(ours, theirs):
    return all(torch.equal(kept, theirs.tensors[name]) for name, kept in ours.tensors.items())


@pytest.mark.parametrize(
    "use",
    [
        learn,
        lambda model: learn(model, layer_rate=2.0),
        lambda model: perplexity(model, WINDOWS),
        lambda model: input_norms(model, find_prunable(model), WINDOWS),
        lambda model: order_channels(model, WINDOWS),
        lambda model: calibration_windows("self", byte_tokenizer(), 16, 2, 0, model),
    ],
)
def test_every_part_of_a_model_stays_in_its_mode(use):
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    use(model)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_paths_are_names_too(checkpoint, corpus, mask, tmp_path):
    model, tokenizer = load_model(Path(checkpoint)), load_tokenizer(Path(checkpoint))
    assert model.config._name_or_path == checkpoint
    windows = calibration_windows(Path(corpus), tokenizer, 16, 2, 0)
    assert torch.equal(windows, calibration_windows(corpus, tokenizer, 16, 2, 0))
    assert evaluation_windows(Path(corpus), tokenizer, 16).shape[1] == 16
    mask = proxsparse.load_mask(mask)
    proxsparse.save_pruned(Path(checkpoint), mask, tmp_path / "pruned")
    assert mask_of_pruned(proxsparse.load(tmp_path / "pruned")).tensors.keys() == mask.tensors.keys()
    for wrong in (None, 5):
        with pytest.raises(UsageError, match=f"`model` must be a name or a path; got {wrong}"):
            load_model(wrong)
        with pytest.raises(UsageError, match=f"`dataset` must be a name or a path; got {wrong}"):
            calibration_windows(wrong, tokenizer, 16, 2, 0)


@pytest.mark.parametrize("change", [{"ctx_len": -1}, {"samples": 0}, {"samples": 1.5}, {"seed": None}])
def test_a_number_of_the_text_that_can_not_be_is_named(change, corpus):
    given = {"ctx_len": 16, "samples": 2, "seed": 0} | change
    with pytest.raises(UsageError, match=f"`{next(iter(change))}` must be a whole number of at least"):
        calibration_windows(corpus, byte_tokenizer(), **given)


def test_a_mask_is_made_of_bools_and_goes_with_a_model():
    for wrong in (torch.ones(4, 4), torch.ones(4, 4, dtype=torch.int64), [True]):
        with pytest.raises(UsageError, match="A mask is made of bool tensors; got .* for x"):
            Mask({"x": wrong})
    assert Mask({}).density() == 0
    for wrong in (None, "smollm2-135m", nn.DataParallel(tiny_llama())):
        for use in (mask_of_pruned, lambda model: apply_mask(model, Mask({}))):
            with pytest.raises(UsageError, match="`model` must be a model, as load_model returns it"):
                use(wrong)


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        (lambda model: proxsparse.load_mask(None), "`mask` must be a name or a path; got None"),
        (lambda model: proxsparse.save_mask({}, "x"), "`mask` must be a Mask, as load_mask returns; got dict"),
        (lambda model: evaluation_windows("wiki", byte_tokenizer(), -1), "`ctx_len` must be a whole number"),
        (lambda model: evaluation_windows("wiki", byte_tokenizer(), 16, limit="4"), "`limit` must be a whole number"),
        (lambda model: calibration_windows("wiki", "gpt2", 16, 2, 0), "`tokenizer` must be a tokenizer"),
        (lambda model: perplexity(model, WINDOWS, batch_size=0), "`batch_size` must be a whole number"),
        (lambda model: load_model("smollm2-135m", dtype="float7"), "`dtype` must be auto, or a dtype of torch"),
        (lambda model: proxsparse.load("smollm2-135m", sparce=True), "`sparce` is no argument of loading a model"),
        (lambda model: load_model("smollm2-135m", device="tpu9"), "`device` must be auto, cpu, or a device"),
        (lambda model: maskllm.learn_mask(model, None, WINDOWS, "x"), "`tokenizer` must be a tokenizer"),
        (lambda model: maskllm.learn_mask(None, byte_tokenizer(), WINDOWS, "x"), "`model` must be a model"),
        (lambda model: maskllm.learn_mask(model, byte_tokenizer(), WINDOWS, "x", rate=1), "unexpected keyword.*'rate'"),
        (lambda model: prune_layerwise(None, WINDOWS, Wanda(), TWO_OF_FOUR), "`model` must be a model"),
        (lambda model: prune_layerwise(model, WINDOWS.float(), Wanda(), TWO_OF_FOUR), "`windows` must be an int64"),
        (lambda model: prune_layerwise(model, WINDOWS, Wanda(), "2:4", update="no"), "`update` must be True or False"),
        (lambda model: load_model("smollm2-135m", trust_remote_code="no"), "`trust_remote_code` must be.*got 'no'"),
        (lambda model: load_tokenizer("smollm2-135m", trust_remote_code="no"), "`trust_remote_code` must be"),
        (lambda model: proxsparse.load("smollm2-135m", sparse="no"), "`sparse` must be True or False; got 'no'"),
        (lambda model: evaluation_windows("wiki", byte_tokenizer(), 16, bos="no"), "`bos` must be True or False"),
    ],
)
def test_arguments_that_can_not_be_are_named(use, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        use(tiny_llama())
    assert not list(tmp_path.iterdir())


def test_a_pattern_may_be_text():
    mask = prune_layerwise(tiny_llama(), WINDOWS, Wanda(), "4:8")
    assert mask.pattern == Pattern(4, 8)
    assert learn(tiny_llama(), pattern=mask.pattern).pattern == mask.pattern


def test_a_weight_without_a_scale_is_told_as_it_is():
    for value, found in ((float("nan"), "has NaN entries"), (0.0, "is zero, or nearly so")):
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.fill_(value)
        with pytest.raises(UsageError, match=f"layers.0.mlp.up_proj.weight {found}"):
            proxsparse.learn_mask(model, byte_tokenizer(), WINDOWS, "paper", bf16=False)


@pytest.mark.parametrize("kind", ["gemma4_text", "longcat_flash"])
def test_what_differs_from_layer_to_layer_does_not_stop_an_order(kind):
    model = tiny_model(kind).eval()
    with torch.no_grad():
        before = model(WINDOWS).logits
        order_channels(model, WINDOWS)
        torch.testing.assert_close(model(WINDOWS).logits, before, rtol=1e-3, atol=1e-5)
