"""Channels in another order: the model computes the same, the blocks keep more, and every form of a mask knows it."""

import contextlib
import json
import shutil
from itertools import combinations

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from test_checkpoint import tensors_of
from test_prunable import build
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.baselines import METHODS
from proxsparse.baselines.method import Wanted
from proxsparse.commands import prune as prune_command
from proxsparse.deploy.dense import save_pruned
from proxsparse.errors import RunError, UsageError
from proxsparse.learning.keep import Kept
from proxsparse.mask import Mask, apply_mask, load_mask, mask_of_pruned, save_mask
from proxsparse.model.channels import (
    NOTE,
    ORDER_FILE,
    ChannelOrder,
    Move,
    load_order,
    mark,
    order_of,
    put_into_order,
    reordered,
    save_order,
)
from proxsparse.model.loading import load_model
from proxsparse.model.ordering import arrange, kept, order_channels
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.pattern import Pattern
from proxsparse.operator.prox import top2_mask

WINDOWS = torch.randint(1, 63, (4, 24), generator=torch.Generator().manual_seed(0))
WIRED = ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe"]


def spread(model):
    """Weights large enough that a wrong order shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return model.eval()


@pytest.mark.parametrize("family", WIRED)
@torch.no_grad()
def test_the_function_is_the_same_and_blocks_keep_more(family):
    model = spread(build(family))
    before, weights = model(WINDOWS).logits, {n: p.clone() for n, p in model.named_parameters()}
    scores = kept_by(model)
    order = order_channels(model, None)
    assert order_of(model) == order
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    moved = {(move.name, move.dim) for move in order.moves}
    assert (embedding, 1) in moved
    assert sum(len({t.in_dim for t in find_prunable(model) if t.name == name}) for name, _ in moved) > 4
    torch.testing.assert_close(model(WINDOWS).logits, before, rtol=1e-4, atol=1e-4)
    after = kept_by(model)
    assert sum(after.values()) > 1.005 * sum(scores.values())
    with pytest.raises(UsageError, match="load the model that it was made from"):
        order_channels(model, None)
    order.inverse().apply(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def kept_by(model):
    return {t.name: float(kept(t.rows(t.weight.detach()).abs().flatten(0, -2))) for t in find_prunable(model)}


def test_an_order_that_changes_the_function_is_undone_and_said(monkeypatch, caplog):
    model = spread(build("llama"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrong = ChannelOrder([Move("model.layers.0.mlp.down_proj.weight", 1, "x")], {"x": torch.arange(64).flip(0)})
    monkeypatch.setattr("proxsparse.model.ordering._order", lambda *args: wrong)
    assert not order_channels(model, None)
    assert "keep their order: another one would change what the model computes" in caplog.text
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_architecture_that_is_not_known_keeps_its_order(caplog):
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2))
    assert not order_channels(model, WINDOWS)
    assert "how they are wired is not known" in caplog.text


def test_the_best_order_of_few_channels_is_found():
    """Eight channels: every way to deal them into two blocks is tried."""
    generator = torch.Generator().manual_seed(3)
    ratio = []
    for _ in range(20):
        scores = torch.rand(6, 8, generator=generator) ** 2
        ways = ([*c, *(i for i in range(8) if i not in c)] for c in combinations(range(8), 4))
        best = max(kept(scores[:, way]) for way in ways)
        found = arrange(scores)
        assert sorted(found.tolist()) == list(range(8))
        assert kept(scores[:, found]) >= kept(scores)
        ratio.append(kept(scores[:, found]) / best)
    assert sum(ratio) / len(ratio) > 0.99


def test_important_channels_do_not_meet():
    scores = torch.full((5, 16), 0.1)
    scores[:, :8] = 1.0  # eight of sixteen channels, all in two blocks: half of them would be lost
    assert kept(scores[:, arrange(scores)]) == pytest.approx(5 * 8 * 1.0)


def test_stacked_experts_have_an_order_each():
    tensor = torch.arange(12.0).view(2, 2, 3)
    index = torch.tensor([[2, 0, 1], [0, 2, 1]])
    assert reordered(tensor, 2, index).tolist() == [[[2, 0, 1], [5, 3, 4]], [[6, 8, 7], [9, 11, 10]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channels") / "base"
    spread(tiny_llama()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(base, corpus, tmp_path_factory):
    """Folder of a Wanda mask for another order of the channels."""
    folder = tmp_path_factory.mktemp("channels") / "wanda"
    flags = ["--dataset", corpus, "--ctx_len", "32", "--nsamples", "4", "--permute", "auto", "--save", str(folder)]
    assert console(["prune", "--model", str(base), "--prune_method", "wanda", *flags]) == 0
    return folder


def test_a_mask_knows_its_order_and_application_puts_the_model_into_it(base, pruned, tmp_path):
    mask = load_mask(pruned)
    assert mask.order
    model = proxsparse.load_model(str(base))
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_mask(model, mask)
    for name, parameter in model.named_parameters():
        wanted = mask.order.of(name, whole[name])
        assert torch.equal(parameter, wanted.where(mask.tensors[name], 0.0) if name in mask.tensors else wanted), name
    apply_mask(model, mask)  # a second time changes nothing
    assert torch.equal(model.model.norm.weight, mask.order.of("model.norm.weight", whole["model.norm.weight"]))
    save_mask(mask, tmp_path / "again.safetensors")
    assert load_mask(tmp_path / "again.safetensors").order == mask.order
    with pytest.raises(UsageError, match="stand in another order: give the model that the mask was made from"):
        apply_mask(model, Mask({n: top2_mask(torch.rand(m.shape)) for n, m in mask.tensors.items()}))


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_an_export_is_the_base_in_its_order_under_the_mask(form, base, pruned, tmp_path, capsys):
    flags = ["--model", str(base), "--mask", str(pruned), "--form", form, "--to", str(tmp_path / "out")]
    assert console(["export", *flags]) == 0
    assert console(["check", "--model", str(tmp_path / "out"), "--base", str(base)]) == 0
    model = proxsparse.load_model(str(base))
    apply_mask(model, load_mask(pruned))
    read = proxsparse.load_model(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(read(WINDOWS).logits, model(WINDOWS).logits)
    (tmp_path / "out" / ORDER_FILE).unlink()
    capsys.readouterr()
    assert console(["check", "--model", str(tmp_path / "out"), "--base", str(base)]) == 2
    assert "order that channel_order.npz should hold: copy that file" in capsys.readouterr().err
    assert console(["check", "--model", str(tmp_path / "out"), "--base", str(tmp_path / "out")]) == 0
    if form == "dense":  # whose files others read, and forget the note of
        forget_order(tmp_path / "out")
        assert console(["check", "--model", str(tmp_path / "out"), "--base", str(base)]) == 1


def test_application_writes_what_export_writes(base, pruned, tmp_path, corpus):
    common = ["--model", str(base), "--mask", str(pruned)]
    assert console(["export", *common, "--to", str(tmp_path / "export")]) == 0
    assert console(["apply", *common, "--save", str(tmp_path / "apply"), "--no_eval"]) == 0
    ours, theirs = tensors_of(tmp_path / "export"), tensors_of(tmp_path / "apply")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "apply" / ORDER_FILE).is_file()


@pytest.mark.parametrize("family", WIRED)
def test_a_mask_of_ones_exports_a_checkpoint_with_the_dense_logits(family, tmp_path):
    """Plain transformers reads it: nothing but the order of channels has changed."""
    spread(build(family)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = proxsparse.load_model(str(tmp_path / "base"))
    with torch.no_grad():
        before = model(WINDOWS).logits
    order = order_channels(model, WINDOWS)
    ones = {t.name: torch.ones_like(t.rows(t.weight), dtype=torch.bool) for t in find_prunable(model)}
    proxsparse.save_pruned(str(tmp_path / "base"), Mask(ones, order=order), tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(read(WINDOWS).logits, before, rtol=1e-4, atol=1e-4)
    stored = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert stored[0].keys() == stored[1].keys()
    assert any(not torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def learning(base, corpus, out, *more):
    flags = ["--model", str(base), "--dataset", corpus, "--ctx_len", "32", "--samples", "8", "--bf16", "false"]
    return ["learn", *flags, "--save_steps", "4", "--use_cpu", "true", "--output_dir", str(out), *more]


def test_a_run_learns_in_its_order_and_every_command_knows_it(base, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert console(learning(base, corpus, run, "--permute", "auto")) == 0
    learned = load_mask(run)
    assert learned.order
    assert console(["extract", "--run", str(run)]) == 0
    again = load_mask(run)
    assert again.order == learned.order
    assert all(torch.equal(again.tensors[name], mask) for name, mask in learned.tensors.items())
    assert console(["apply", "--run", str(run), "--max_windows", "2"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])[corpus]
    evaluation = ["--dataset", corpus, "--split", "heldout", "--ctx_len", "32", "--max_windows", "2"]
    assert console(["eval", "--model", str(run / "pruned"), *evaluation]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[corpus] == measured
    assert console(["check", "--model", str(run / "pruned"), "--base", str(base)]) == 0
    assert console(learning(base, corpus, run)) == 2
    assert "--permute auto, now it is none" in capsys.readouterr().err


def test_a_baseline_takes_the_order_of_the_run_where_the_text_is_the_same(base, corpus, tmp_path, monkeypatch):
    run, chosen = tmp_path / "run", []
    assert console(learning(base, corpus, run, "--permute", "auto")) == 0
    real = prune_command.order_channels
    monkeypatch.setattr(prune_command, "order_channels", lambda *args, **kwargs: chosen.append(real(*args, **kwargs)))
    orders = []
    for name, more in {"same": [], "other": ["--seed", "7"], "wider": ["--sparsity_type", "4:8"]}.items():
        flags = ["--prune_method", "wanda", "--save", str(tmp_path / name), *more]
        assert console(["prune", "--run", str(run), *flags]) == 0
        orders.append(load_mask(tmp_path / name).order)
    assert orders[0] == load_mask(run).order
    assert orders[1:] == chosen  # chosen anew
    # What the run chose is what the baseline would have chosen.
    shutil.copytree(run, tmp_path / "without")
    (tmp_path / "without" / "channel_order.npz").unlink()
    assert console(["prune", "--run", str(tmp_path / "without"), "--prune_method", "wanda"]) == 0
    assert chosen[-1] == orders[0]


def test_a_stopped_run_goes_on_in_its_order(base, corpus, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert console(learning(base, corpus, whole, "--permute", "auto")) == 0
    shutil.copytree(whole, broken)
    (broken / "mask.safetensors").unlink()
    (broken / "history.json").unlink()
    shutil.rmtree(broken / "checkpoint-8")
    assert console(learning(base, corpus, broken, "--permute", "auto")) == 0
    ours, theirs = load_mask(whole), load_mask(broken)
    assert ours.order == theirs.order
    assert all(torch.equal(ours.tensors[name], mask) for name, mask in theirs.tensors.items())


def test_python_gets_its_model_back_in_the_old_order(base, corpus):
    model, tokenizer = proxsparse.load_model(str(base)), proxsparse.load_tokenizer(str(base))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    windows = proxsparse.calibration_windows(corpus, tokenizer, 32, 4, seed=0)
    mask = proxsparse.learn_mask(model, tokenizer, windows, permute="auto", bf16=False)
    assert mask.order
    assert not order_of(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    apply_mask(model, mask)
    assert order_of(model) == mask.order


def test_an_order_that_does_not_fit_and_a_damaged_one_are_one_sentence(base, pruned, tmp_path):
    order = load_mask(pruned).order
    with pytest.raises(UsageError, match="does not fit the model"):
        put_into_order(tiny_llama(intermediate_size=128), order)
    with pytest.raises(ValueError, match="names channels twice"):
        ChannelOrder.unpacked([["w", 0, "k"]], {"k": torch.tensor([0, 0, 1])})
    (tmp_path / ORDER_FILE).write_bytes(b"nothing")
    with pytest.raises(RunError, match="is damaged"):
        load_order(tmp_path / ORDER_FILE)
    save_order(order, tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    for place in range(0, len(whole), 97):
        (tmp_path / ORDER_FILE).write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with contextlib.suppress(RunError):  # a byte that nothing is read from does no harm
            load_order(tmp_path / ORDER_FILE)


def test_the_order_of_a_model_with_fewer_layers_is_refused(tmp_path):
    shallow, deep = spread(tiny_llama(num_hidden_layers=1)), spread(tiny_llama(num_hidden_layers=2))
    deep.save_pretrained(tmp_path / "deep")
    before = deep(WINDOWS).logits
    order = order_channels(shallow, None)
    mask = Mask({t.name: top2_mask(t.weight.detach()) for t in find_prunable(shallow)}, order=order)
    with pytest.raises(UsageError, match="made for another model: .* leaves out model.layers.1"):
        apply_mask(deep, mask)
    assert torch.equal(deep(WINDOWS).logits, before)
    with pytest.raises(UsageError, match="made for another model"):
        save_pruned(str(tmp_path / "deep"), mask, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_form_without_room_for_the_order_is_refused(base, pruned, tmp_path, capsys):
    flags = ["--model", str(base), "--mask", str(pruned), "--to", str(tmp_path / "out")]
    assert console(["export", *flags, "--form", "npz"]) == 2
    assert "use --form mask, or make the mask with permute none" in capsys.readouterr().err
    assert console(["export", *flags, "--form", "mask"]) == 0
    assert load_mask(tmp_path / "out").order == load_mask(pruned).order
    assert "`mask.safetensors` says which" in (tmp_path / "out" / "README.md").read_text()


def test_a_pattern_without_blocks_keeps_its_order(base, tmp_path, capsys):
    flags = [
        "--prune_method",
        "magnitude",
        "--sparsity_type",
        "unstructured",
        "--permute",
        "auto",
        "--save",
        str(tmp_path),
    ]
    assert console(["prune", "--model", str(base), *flags]) == 2
    assert "--permute auto is for N:M patterns" in capsys.readouterr().err


@pytest.fixture
def moved(tmp_path):
    """A tiny Llama on disk, and a mask of it whose channels were moved."""
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model = load_model(str(folder))
    order_channels(model, torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(0)))
    assert order_of(model)
    tensors = {t.name: top2_mask(t.rows(t.weight.detach())) for t in find_prunable(model)}
    return folder, Mask(tensors, base_model=str(folder), order=order_of(model))


def zeros_of(model):
    return {t.name: (t.weight == 0).double().mean().item() for t in find_prunable(model)}


def test_a_model_that_is_pruned_in_an_order_is_never_moved_again(moved, tmp_path):
    folder, mask = moved
    model = load_model(str(folder))
    apply_mask(model, mask)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")  # as a Trainer's checkpoint
    forget_order(tmp_path / "plain")
    for prune in (apply_mask, Kept):
        again = load_model(str(tmp_path / "plain"))
        prune(again, mask)
        assert all(torch.equal(tensor, want[name]) for name, tensor in again.state_dict().items())
    assert set(zeros_of(again).values()) == {0.5}
    save_pruned(str(tmp_path / "plain"), mask, tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensor, want[name]) for name, tensor in found.items())


def forget_order(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config.pop(NOTE)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_order_is_known_of_a_model_that_was_trained_and_saved_by_others(moved, tmp_path):
    folder, mask = moved
    save_pruned(str(folder), mask, tmp_path / "pruned", tokenizer=byte_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3  # zeros too
    model.save_pretrained(tmp_path / "tuned")
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, bits in mask.tensors.items():
        want[name][~bits] = 0
    save_pruned(str(tmp_path / "tuned"), mask, tmp_path / "out")
    for prune in (apply_mask, lambda again, mask: save_pruned(again, mask, tmp_path / "memory")):
        again = load_model(str(tmp_path / "tuned"))
        prune(again, mask)
    for found in (again, load_model(str(tmp_path / "out")), load_model(str(tmp_path / "memory"))):
        assert all(torch.equal(p * (want[name] != 0), want[name]) for name, p in found.named_parameters())
    other = Mask(mask.tensors, order=mask.order.inverse())
    for wrong in (str(tmp_path / "tuned"), load_model(str(tmp_path / "tuned"))):
        with pytest.raises(UsageError, match="stand in another order|is for another order"):
            save_pruned(wrong, other, tmp_path / "wrong")
    with pytest.raises(UsageError, match="stand in another order"):
        apply_mask(load_model(str(tmp_path / "tuned")), other)
    with pytest.raises(UsageError, match="stand in an order of their own already"):
        order_channels(load_model(str(tmp_path / "tuned")), WINDOWS)


@pytest.fixture
def tuned(moved, tmp_path):
    """Folder of a model in an order that was saved by others, so that only the digest of the order is known."""
    folder, mask = moved
    save_pruned(str(folder), mask, tmp_path / "pruned", tokenizer=byte_tokenizer())
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").save_pretrained(tmp_path / "tuned")
    byte_tokenizer().save_pretrained(tmp_path / "tuned")
    assert not (tmp_path / "tuned" / ORDER_FILE).exists()
    return tmp_path / "tuned"


def test_models_that_share_a_configuration_are_moved_each(moved):
    folder, mask = moved
    first, second = load_model(str(folder)), load_model(str(folder))
    second.config = first.config
    apply_mask(first, mask)
    assert not order_of(second)
    apply_mask(second, mask)
    assert all(torch.equal(p, second.get_parameter(name)) for name, p in first.named_parameters())
    copied = type(first)(first.config)  # which stands in the order of what it is a copy of
    copied.load_state_dict(first.state_dict())
    apply_mask(copied, mask)
    assert all(torch.equal(p, copied.get_parameter(name)) for name, p in first.named_parameters())
    assert first.model.config is first.config


def test_weights_on_disk_are_moved_with_the_others(moved, tmp_path):
    folder, mask = moved
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    mark(model, mask.order)  # as if the weights here had been moved
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(mask.order.of(name, parameter.detach()))
    for given, out in ((model, "memory"), (str(folder), "files")):
        save_pruned(given, mask, tmp_path / out)
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("memory", "files"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_learning_and_recovery_keep_what_is_known_of_the_order(moved, tuned):
    folder, mask = moved
    model = load_model(str(tuned))
    before = order_of(model)
    assert before == mask.order
    assert not before.moves
    learned = proxsparse.learn_mask(model, byte_tokenizer(), WINDOWS, bf16=False, layer_rate=0.0)
    assert order_of(model) == before == learned.order
    dense, pruned = load_model(str(folder)), load_model(str(folder))
    proxsparse.recover(pruned, dense, mask, byte_tokenizer(), WINDOWS, bf16=False)
    for known in (dense, pruned):
        assert order_of(known) == mask.order
        assert getattr(known.config, NOTE) == mask.order.digest


def test_a_mask_and_a_model_of_other_orders_are_refused_also_where_only_digests_are_known(moved, tuned, tmp_path):
    folder, mask = moved
    plain, kept = Mask(mask.tensors), mask_of_pruned(load_model(str(tuned)))
    save_mask(kept, tmp_path / "kept.safetensors")
    kept = load_mask(tmp_path / "kept.safetensors")
    assert kept.order == mask.order
    assert not kept.order.moves
    for name, other in ((tuned, plain), (folder, kept)):
        with pytest.raises(UsageError, match="another order"):
            apply_mask(load_model(str(name)), other)
        for given in (str(name), load_model(str(name))):
            with pytest.raises(UsageError, match="another order"):
                save_pruned(given, other, tmp_path / "wrong")
    with pytest.raises(UsageError, match="stand in another order"):
        proxsparse.recover(load_model(str(tuned)), load_model(str(folder)), kept, byte_tokenizer(), WINDOWS, bf16=False)
    apply_mask(load_model(str(tuned)), kept)
    save_pruned(str(tuned), kept, tmp_path / "out")
    assert mask_of_pruned(load_model(str(tmp_path / "out"))).order == mask.order


def test_a_run_on_a_model_of_which_only_the_digest_is_known_can_be_extracted(tuned, corpus, tmp_path, capsys):
    flags = ["--dataset", corpus, "--ctx_len", "32", "--samples", "4", "--bf16", "false", "--use_cpu", "true"]
    run = tmp_path / "run"
    assert console(["learn", "--model", str(tuned), *flags, "--output_dir", str(run)]) == 0
    learned = load_mask(run)
    assert console(["extract", "--run", str(run), "--output", str(tmp_path / "again.safetensors")]) == 0
    assert load_mask(tmp_path / "again.safetensors").order == learned.order == order_of(load_model(str(tuned)))
    assert console(["export", "--run", str(run), "--to", str(tmp_path / "out")]) == 0
    shutil.copytree(next(run.glob("checkpoint-*")), tmp_path / "copy")
    capsys.readouterr()
    assert console(["extract", "--checkpoint", str(tmp_path / "copy"), "--output", str(tmp_path / "x")]) == 2
    assert "should hold: copy that file from the folder of the run" in capsys.readouterr().err


def test_a_pruned_checkpoint_in_an_order_can_be_pruned_and_exported_again_but_not_by_another_order(moved, tmp_path):
    folder, mask = moved
    save_pruned(str(folder), mask, tmp_path / "pruned")
    again = load_model(str(tmp_path / "pruned"))
    assert order_of(again) == mask.order
    assert mask_of_pruned(again).order == mask.order
    save_pruned(again, mask, tmp_path / "twice")
    for name in ("model.safetensors", "channel_order.npz"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes()
    other = Mask(mask.tensors, base_model=str(folder))
    with pytest.raises(UsageError, match="stand in another order than the mask's"):
        save_pruned(str(tmp_path / "pruned"), other, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_mask_of_every_baseline_knows_the_order_of_its_model(method, tmp_path):
    model = tiny_llama()
    order = order_channels(model, WINDOWS)
    assert order
    made, wanted = METHODS[method](), Wanted(update=False, bf16=False, folder=tmp_path)
    mask = made.prune_model(model, byte_tokenizer(), WINDOWS, wanted)
    assert mask.order == order
    assert set(zeros_of(model).values()) == {0.5}
    apply_mask(again := tiny_llama(), mask)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", ["maskllm", "roi"])
def test_a_method_that_learns_prunes_in_an_order_by_command(method, base, corpus, tmp_path, capsys):
    flags = ["--dataset", corpus, "--ctx_len", "32", "--nsamples", "4", "--bf16", "false", "--permute", "auto"]
    command = ["prune", "--model", str(base), *flags, "--save", str(tmp_path / "mask")]
    assert console([*command, "--prune_method", method, "--save_model", str(tmp_path / "pruned")]) == 0
    assert load_mask(tmp_path / "mask").order
    assert console(["check", "--model", str(tmp_path / "pruned"), "--base", str(base)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask", "pruned"]


def test_a_base_that_stands_in_an_order_itself_is_compared_in_it(moved, tmp_path, capsys):
    folder, mask = moved
    save_pruned(str(folder), mask, tmp_path / "pruned")
    again = ["check", "--model", str(tmp_path / "pruned"), "--base"]
    assert console([*again, str(tmp_path / "pruned")]) == 0
    assert console([*again, str(folder)]) == 0
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][tensors[name] != 0] *= 2
    save_file(tensors, tmp_path / "pruned" / "model.safetensors", metadata={"format": "pt"})
    assert console([*again, str(folder)]) == 1
    assert "kept weights differ from the base" in capsys.readouterr().out


def test_a_pattern_that_no_weight_has_blocks_of_is_refused(moved, tmp_path, capsys):
    assert console(["check", "--model", str(moved[0]), "--pattern", "3:7"]) == 2
    assert "has a width that is a multiple of 7" in capsys.readouterr().err


def test_channels_that_make_no_blocks_are_told_apart_from_unknown_ones(caplog):
    order_channels(tiny_llama(intermediate_size=96), None, pattern=Pattern(32, 64))
    assert "96 of them can't be dealt into blocks of 64" in caplog.text
