"""A mask stays kept whatever optimizer, loop or Trainer moves the weights."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from kept_worker import train
from safetensors.torch import load_file
from test_compact import magnitudes
from test_prunable import build
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Adafactor, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.commands.eval import sparse_blocks
from proxsparse.deploy.check import check_sparsity
from proxsparse.errors import UsageError
from proxsparse.mask import Mask, apply_mask, fit_mask, load_mask
from proxsparse.model.bits import pack_bits, unpack_bits
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.masked import learned_mask
from proxsparse.operator.pattern import Pattern

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.arange(1, 25).view(1, -1)


def mask_of(model):
    return Mask(magnitudes(model))


def pruned_bits(model, mask):
    """All bits of the pruned weights: 0 where every one is +0.0."""
    found = []
    for name, target in fit_mask(model, mask).items():
        rows = target.rows(target.weight.detach().float()).contiguous()
        found.append(rows[~mask.tensors[name]].view(torch.int32))
    return torch.cat(found)


def step(model, optimizer):
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 5, 4)])
def test_packed_bits_come_back(shape):
    mask = torch.rand(shape) > 0.5
    packed = pack_bits(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adafactor": lambda p: Adafactor(p, lr=0.01, relative_step=False),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_pruned_weights_are_plus_zero_after_every_step_and_kept_ones_move(kind, family):
    model = build(family)
    mask = mask_of(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    proxsparse.keep_mask(model, mask, optimizer)
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, optimizer)
        assert not pruned_bits(model, mask).any()
        assert all(not torch.equal(target.weight, before[name]) for name, target in fit_mask(model, mask).items())


def test_kept_weights_move_as_the_optimizer_alone_would_move_them(model):
    alone, mask = tiny_llama(), mask_of(model)
    apply_mask(alone, mask)
    pairs = [(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, alone)]
    proxsparse.keep_mask(*pairs[0][:1], mask, pairs[0][1])
    for pair in pairs:
        step(*pair)
    apply_mask(alone, mask)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_the_optimizer_is_free_again_after_remove(model):
    mask, optimizer = mask_of(model), torch.optim.SGD(model.parameters(), lr=0.1)
    kept = proxsparse.keep_mask(model, mask, optimizer)
    kept.remove()
    step(model, optimizer)
    assert pruned_bits(model, mask).any()
    kept.apply()
    assert not pruned_bits(model, mask).any()


def test_a_step_that_a_gradient_scaler_skips_changes_nothing(model):
    mask, optimizer = mask_of(model), torch.optim.AdamW(model.parameters(), lr=0.01)
    proxsparse.keep_mask(model, mask, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (torch.inf, 1.0):
        scaler.scale(model(input_ids=IDS, labels=IDS).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert same == (factor == torch.inf)
        assert not pruned_bits(model, mask).any()


def test_eight_bit_optimizers_keep_it_too(model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    mask = mask_of(model)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.01, min_8bit_size=1)
    proxsparse.keep_mask(model, mask, optimizer)
    step(model, optimizer)
    assert not pruned_bits(model, mask).any()


def test_compiled_and_prepared_models_and_bfloat16_weights_are_taken(accelerator):
    model = tiny_llama().to(torch.bfloat16)
    mask = mask_of(model)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    proxsparse.keep_mask(torch.compile(prepared, backend="eager"), mask, optimizer)
    step(prepared, optimizer)
    assert not pruned_bits(model, mask).any()


@pytest.fixture
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def texts(count=8):
    return Dataset.from_dict({"text": [f"Sentence {i}: some weights matter more than others." for i in range(count)]})


SETTINGS = {"use_cpu": True, "max_steps": 3, "learning_rate": 0.01, "report_to": "none", "save_strategy": "no"}


def test_a_plain_sfttrainer_with_the_callback_makes_a_checkpoint_that_passes_the_check(model, tokenizer, tmp_path):
    mask = mask_of(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), bf16=False, gradient_accumulation_steps=2, per_device_train_batch_size=1,
        max_length=32, weight_decay=0.1, **SETTINGS | {"save_strategy": "steps", "save_steps": 2},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=texts(), processing_class=tokenizer, callbacks=[proxsparse.KeepMask(mask)]
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    for folder in (tmp_path / "tuned", tmp_path / "run" / "checkpoint-2"):
        counts, offenders = check_sparsity(str(folder))
        assert counts["blocks"] > 0
        assert offenders == []
    assert not pruned_bits(model, mask).any()
    for name, kept in mask.tensors.items():
        assert not torch.equal(model.get_parameter(name)[kept], start[name][kept])


def test_any_trainer_may_train_twice_and_lets_the_optimizer_go(model, tmp_path):
    mask = mask_of(model)
    rows = Dataset.from_dict({"input_ids": IDS.repeat(4, 1).tolist(), "labels": IDS.repeat(4, 1).tolist()})
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path), **SETTINGS), train_dataset=rows, callbacks=[proxsparse.KeepMask(mask)]
    )
    for _ in range(2):
        trainer.train()
        assert not pruned_bits(model, mask).any()
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_the_zeros_of_a_pruned_model_are_a_mask(checkpoint, mask, tmp_path):
    proxsparse.save_pruned(checkpoint, load_mask(mask), tmp_path / "pruned")
    model = proxsparse.load_model(str(tmp_path / "pruned"))
    found = proxsparse.mask_of_pruned(model).tensors
    wanted = load_mask(mask).tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_zeros_of_other_patterns_are_a_mask_too(checkpoint, tmp_path):
    model = tiny_llama()
    rows = {target.name: target.rows(target.weight.detach()) for target in find_prunable(model, multiple=8)}
    mask = Mask({name: learned_mask(weight, Pattern(4, 8)) for name, weight in rows.items()}, Pattern(4, 8))
    proxsparse.save_pruned(model, mask, tmp_path / "pruned")
    pruned = proxsparse.load(tmp_path / "pruned")
    kinds = {*(target.kind for target in find_prunable(model)), "all"}
    assert sparse_blocks(pruned) == (mask.pattern, dict.fromkeys(kinds, 1.0))
    found = proxsparse.mask_of_pruned(pruned)  # which pattern was noted
    assert found.pattern == mask.pattern
    assert all(torch.equal(found.tensors[name], kept) for name, kept in mask.tensors.items())
    assert found.tensors.keys() == mask.tensors.keys()
    apply_mask(model, mask)
    model.config._name_or_path = ""
    with pytest.raises(UsageError, match="No weight of the model is 1:4|the model is not 1:4"):
        proxsparse.mask_of_pruned(model, "1:4")
    for wanted in (None, "4:8", Pattern(4, 8)):
        assert proxsparse.mask_of_pruned(model, wanted).pattern == mask.pattern
    with pytest.raises(UsageError, match="`pattern` must be N:M with N < M, as 2:4 or 4:8; got 'unstructured'"):
        proxsparse.mask_of_pruned(model, "unstructured")


def test_a_dense_model_and_a_damaged_one_have_no_mask(model):
    with pytest.raises(UsageError, match="No weight of .* is 2:4: give a pruned model"):
        proxsparse.mask_of_pruned(model)
    apply_mask(model, mask_of(model))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :4] = 1.0
    with pytest.raises(UsageError, match=r"1 of 512 blocks of model.layers.1.mlp.up_proj.weight have more than 2 non"):
        proxsparse.mask_of_pruned(model)


def test_a_mask_that_does_not_fit_is_refused_in_a_sentence(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    deeper = mask_of(tiny_llama(num_hidden_layers=3))
    with pytest.raises(UsageError, match="does not fit .*it has 7 weights the model lacks"):
        proxsparse.keep_mask(model, deeper, optimizer)
    with pytest.raises(UsageError, match="has shape .* in the mask and"):
        proxsparse.keep_mask(model, mask_of(tiny_llama(intermediate_size=48)), optimizer)


def test_an_optimizer_of_other_weights_or_without_hooks_is_refused(model):
    mask = mask_of(model)
    with pytest.raises(UsageError, match="moves none of the 14 weights"):
        proxsparse.keep_mask(model, mask, torch.optim.SGD([model.model.norm.weight], lr=0.1))
    with pytest.raises(UsageError, match="must be a torch.optim.Optimizer .*got object"):
        proxsparse.keep_mask(model, mask, object())
    with pytest.raises(UsageError, match="must be a model of transformers; got Linear"):
        proxsparse.keep_mask(torch.nn.Linear(4, 4), mask, torch.optim.SGD(model.parameters()))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sharded_weights_train_as_whole_ones_do(family, one_process):
    whole, sharded = build(family).eval(), build(family).eval()  # without dropout
    mask = mask_of(whole)
    fully_shard(sharded)
    train(whole, mask)
    train(sharded, mask)
    with pytest.raises(UsageError, match="is sharded: take the mask from its zeros before that"):
        proxsparse.mask_of_pruned(sharded)
    for (name, wanted), found in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(found, DTensor)
        torch.testing.assert_close(found.full_tensor(), wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, lambda layer: torch.compile(layer, backend="eager")])
def test_layers_in_wrappers_are_the_same_layers(wrapper, model):
    mask = mask_of(model)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = wrapper(layer)
    assert all(name.split(".")[3].startswith("_") for name, _ in model.named_parameters() if "layers" in name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    proxsparse.keep_mask(model, mask, optimizer)
    step(model, optimizer)
    assert not pruned_bits(model, mask).any()
    assert proxsparse.mask_of_pruned(model).tensors.keys() == mask.tensors.keys()


@pytest.mark.slow
def test_uneven_shards_train_as_whole_weights_do(checkpoint, mask, tmp_path, torchrun):
    done = torchrun(3, "kept_worker.py", checkpoint, mask, tmp_path / "found")
    assert done.returncode == 0, done.stderr[-3000:]
    model = proxsparse.load_model(checkpoint)
    train(model, load_mask(mask))
    found = load_file(tmp_path / "found")
    for name, wanted in model.named_parameters():
        torch.testing.assert_close(found[name], wanted.detach(), rtol=1e-4, atol=1e-5)
    for name, kept in load_mask(mask).tensors.items():
        assert not found[name][~kept].view(torch.int32).any()


def test_a_pruned_checkpoint_whose_channels_were_moved_keeps_its_order(checkpoint, tmp_path):
    flags = ["--prune_method", "magnitude", "--permute", "auto", "--save", str(tmp_path / "mask")]
    assert console(["prune", "--model", checkpoint, *flags]) == 0
    mask = load_mask(tmp_path / "mask")
    assert mask.order
    proxsparse.save_pruned(checkpoint, mask, tmp_path / "pruned")
    model = proxsparse.load_model(str(tmp_path / "pruned"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    proxsparse.keep_mask(model, mask, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert proxsparse.mask_of_pruned(model).order == mask.order
    assert apply_mask(model, mask)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    proxsparse.save_pruned(str(tmp_path / "pruned"), mask, tmp_path / "streamed")
    proxsparse.save_pruned(proxsparse.load_model(str(tmp_path / "pruned")), mask, tmp_path / "again")
    for folder in ("streamed", "again"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
        assert check_sparsity(str(tmp_path / folder), checkpoint)[1] == []


@pytest.mark.parametrize("prune", [apply_mask, lambda model, mask: proxsparse.keep_mask(model, mask, None)])
def test_something_else_than_a_mask_is_refused(prune):
    with pytest.raises(UsageError, match="`mask` must be a Mask, as load_mask returns; got str"):
        prune(tiny_llama(), "mask.safetensors")
