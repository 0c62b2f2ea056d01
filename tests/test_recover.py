"""Recovery: the kept weights learn from the dense model, the mask stays, and what is saved says so."""

import copy
import json
import shutil

import pytest
import torch
from conftest import tiny_llama
from test_compact import magnitudes
from test_prunable import build

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.errors import RunError, UsageError
from proxsparse.learning import layers
from proxsparse.learning.recover import SCOPES, RecoveryTrainer, recover
from proxsparse.mask import Mask, apply_mask, fit_mask, load_mask
from proxsparse.model.ordering import order_channels

PLAIN = {"bf16": False, "logging_steps": 1, "save_steps": 2}


@pytest.fixture
def windows():
    return torch.randint(1, 257, (6, 24), generator=torch.Generator().manual_seed(0))


def pruned_and_dense(**sizes):
    dense, pruned = tiny_llama(**sizes), tiny_llama(**sizes)
    mask = Mask(magnitudes(dense))
    apply_mask(pruned, mask)
    return pruned, dense, mask


def copy_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def divergence(model, dense, windows):
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits.log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("scope", ["full", "layer"])
def test_kept_weights_and_gains_move_and_zeros_and_ends_do_not(scope, tokenizer, windows):
    model, dense, mask = pruned_and_dense()
    before, far = copy_of(model), divergence(model, dense, windows)
    teacher = copy_of(dense)
    recover(model, dense, mask, tokenizer, windows, scope=scope, num_train_epochs=4, learning_rate=0.01, **PLAIN)
    names = moved(model, before)
    assert set(mask.tensors) <= names
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & names
    for name, target in fit_mask(model, mask).items():
        assert not target.rows(target.weight.detach())[~mask.tensors[name]].view(torch.int32).any(), name
    assert divergence(model, dense, windows) < 0.9 * far
    assert not moved(dense, teacher)
    assert all(p.requires_grad for p in [*model.parameters(), *dense.parameters()])


def test_with_scope_norms_every_matrix_keeps_its_bits(tokenizer, windows):
    model, dense, mask = pruned_and_dense()
    before, far = copy_of(model), divergence(model, dense, windows)
    recover(model, dense, mask, tokenizer, windows, scope="norms", num_train_epochs=4, **PLAIN)
    assert moved(model, before) == {name for name in before if "norm" in name}
    assert divergence(model, dense, windows) < far


@pytest.mark.parametrize("scope", ["full", "layer"])
def test_a_recovery_that_stopped_goes_on_to_the_same_weights(scope, tokenizer, windows, tmp_path, monkeypatch):
    unbroken, dense, mask = pruned_and_dense()
    history = recover(unbroken, dense, mask, tokenizer, windows, tmp_path / "unbroken", scope=scope, **PLAIN)
    model, *_ = pruned_and_dense()
    owner, name, nth = {"full": (RecoveryTrainer, "_teacher", 4), "layer": (layers, "fit", 2)}[scope]
    calls, whole = [], getattr(owner, name)

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(KeyboardInterrupt):
            recover(model, dense, mask, tokenizer, windows, tmp_path / "broken", scope=scope, **PLAIN)
    model, *_ = pruned_and_dense()  # a new process
    resumed = recover(model, dense, mask, tokenizer, windows, tmp_path / "broken", scope=scope, **PLAIN)
    assert not moved(model, copy_of(unbroken))
    if scope == "layer":  # the Trainer's log has times in it
        assert resumed == history


def test_the_folder_of_a_learning_run_is_not_taken(tokenizer, windows, tmp_path):
    model, dense, mask = pruned_and_dense()
    proxsparse.learn_mask(dense, tokenizer, windows, output_dir=tmp_path, bf16=False, save_strategy="no")
    record = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UsageError, match="holds a run of learning: give another `output_dir`"):
        recover(model, dense, mask, tokenizer, windows, tmp_path, **PLAIN)
    assert (tmp_path / "run.json").read_bytes() == record


@pytest.fixture(scope="module")
def run(checkpoint, corpus, tmp_path_factory):
    """A finished run of learning."""
    out = tmp_path_factory.mktemp("recover") / "run"
    flags = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", "32", "--samples", "4", "--bf16", "false"]
    assert console(["learn", *flags, "--use_cpu", "true", "--output_dir", str(out)]) == 0
    return out


def test_the_command_writes_a_checkpoint_that_is_24_and_says_that_its_weights_moved(run, checkpoint, capsys):
    assert console(["recover", "--run", str(run), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["to"], found["tokens"]) == (str(run / "recovered"), 4 * 32)
    assert console(["check", "--model", found["to"]]) == 0
    assert console(["check", "--model", found["to"], "--base", checkpoint]) == 1  # the kept weights moved
    assert "kept weights were updated by distilling the dense model" in (run / "recovered" / "README.md").read_text()
    assert not (run / "recovered-training").exists()
    assert console(["export", "--model", found["to"], "--form", "compact", "--to", str(run / "small")]) == 0
    card = (run / "small" / "README.md").read_text()
    assert "kept weights were updated by distilling the dense model" in card
    assert f"This is {checkpoint} with 50% of its prunable weights kept" in card
    capsys.readouterr()
    capsys.readouterr()
    assert console(["recover", "--run", str(run)]) == 0
    assert "done already" in capsys.readouterr().out
    assert console(["recover", "--run", str(run), "--scope", "norms"]) == 2
    assert "was recovered with other settings" in capsys.readouterr().err
    for words in ("apply",), ("eval",), ("eval", "--model", found["to"]), ("report",):
        assert console([*words, "--run", str(run)]) == 0, capsys.readouterr().err
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*rows][2:] == ["dense", "ProxSparse 2:4, weights updated", "ProxSparse 2:4"]
    assert rows["dense"] != rows["ProxSparse 2:4"] != rows["ProxSparse 2:4, weights updated"]
    shutil.rmtree(run / "recovered")
    assert console(["recover", "--run", str(run), "--device", "cpu", "--scope", "norms"]) == 0
    assert not (run / "recovered.json").exists()  # it was measured of other weights


def test_a_pruned_checkpoint_and_its_dense_model_need_no_run(checkpoint, mask, corpus, tmp_path, capsys):
    proxsparse.save_pruned(checkpoint, load_mask(mask), tmp_path / "pruned")
    flags = ["--dataset", corpus, "--ctx_len", "32", "--samples", "2", "--device", "cpu", "--scope", "layer"]
    words = ["--model", str(tmp_path / "pruned"), "--base", checkpoint, "--to", str(tmp_path / "new"), *flags]
    assert console(["recover", *words]) == 0
    before = (tmp_path / "new" / "model.safetensors").read_bytes()
    capsys.readouterr()
    new = str(tmp_path / "new")
    assert console(["export", "--model", checkpoint, "--mask", str(mask), "--to", new]) == 2
    assert "holds weights that were trained (distilling" in capsys.readouterr().err
    assert console(["recover", *words, "--epochs", "0"]) == 2
    assert "--epochs must be" in capsys.readouterr().err
    assert console(["recover", *words, "--epochs", "2"]) == 2
    assert "holds weights that were trained (distilling" in capsys.readouterr().err
    assert console(["recover", *words]) == 0  # the same again
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == before
    again, first = (proxsparse.mask_of_pruned(proxsparse.load_model(str(tmp_path / p))) for p in ("new", "pruned"))
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)


def test_what_recovery_computes_in_is_chosen(checkpoint, mask, corpus, tmp_path):
    found = []
    for bf16 in ("true", "false"):
        flags = ["--dataset", corpus, "--ctx_len", "32", "--samples", "2", "--device", "cpu", "--bf16", bf16]
        words = ["--model", checkpoint, "--mask", str(mask), "--to", str(tmp_path / bf16), *flags]
        assert console(["recover", *words]) == 0
        found.append(copy_of(proxsparse.load_model(str(tmp_path / bf16))))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_does_not_fit_is_told_in_one_sentence(tokenizer, windows, checkpoint, corpus, mask, tmp_path, capsys):
    model, dense, kept = pruned_and_dense()
    other = tiny_llama(hidden_size=64)
    for change, sentence in (
        ({"mask": "runs/mine"}, "`mask` must be a mask, as load_mask returns it; got str"),
        ({"dense": "tiny-llama"}, "`dense` must be a model, as load_model returns it; got str"),
        ({"device": "cuda"}, "`device` must be auto, cpu, or a device of this machine"),
        ({"output_dir": __file__}, "must be a folder; .*test_recover.py is none"),
        ({"dense": other}, "has other weights than the pruned one"),
        ({"windows": windows[0]}, "must be an int64 tensor of token ids of shape"),
        ({"dense": model}, "is the pruned model itself"),
        ({"dense": pruned_and_dense()[0]}, "is pruned by the mask already"),
        ({"scope": "layer", "distill": 0.5}, "have no `distill`"),
        ({"scope": "layer", "optim": "sgd"}, "steps with adafactor; got `optim="),
        ({"loss_type": "dft"}, "distillation takes its place"),
        ({"scope": "all"}, "must be one of full, norms, layer; got 'all'"),
        ({"learning_rate": -1.0}, "`learning_rate` must be a finite number > 0"),
        ({"mask": Mask(magnitudes(other))}, "does not fit"),
        ({"model": tiny_llama().half()}, "float16 can't be learned in"),
    ):
        given = {"model": model, "dense": dense, "mask": kept, "tokenizer": tokenizer, "windows": windows, **PLAIN}
        with pytest.raises(UsageError, match=sentence.replace("'", ".")):
            recover(**(given | change))
    assert console(["recover", "--model", checkpoint, "--to", "x"]) == 2
    assert "required: --dataset, or --run" in capsys.readouterr().err
    (tmp_path / "a-training").mkdir()
    (tmp_path / "a-training" / "mine.txt").touch()
    words = ["recover", "--dataset", corpus, "--ctx_len", "32", "--samples", "2", "--device", "cpu"]
    for flags, code, sentence in (
        (
            ["--model", checkpoint, "--to", "x", "--learning_rate", "0"],
            2,
            "--learning_rate must be a finite number > 0",
        ),
        (["--model", checkpoint, "--to", "x", "--seed", "-1"], 2, "must be an integer between 0"),
        (["--model", checkpoint, "--to", "x"], 2, "give the dense one as --base, or a --mask"),
        (["--model", checkpoint, "--mask", str(mask)], 2, "required: --to, or --run"),
        (["--model", checkpoint, "--mask", str(mask), "--to", corpus], 2, "holds something else"),
        (["--model", checkpoint, "--mask", str(mask), "--to", str(tmp_path / "a")], 2, "give another --to"),
    ):
        assert console([*words, *flags]) == code
        assert sentence in capsys.readouterr().err
    broken = tiny_llama()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(
        RunError, match=r"The loss is nan at step 1. Lower `learning_rate` in a run of another `output_dir`"
    ):
        recover(broken, dense, kept, tokenizer, windows, **PLAIN)


def test_channels_in_another_order_are_recovered_towards_the_same_model(tokenizer, windows):
    model, dense = tiny_llama(), tiny_llama()
    order = order_channels(model, windows)
    mask = Mask(magnitudes(model), order=order)
    apply_mask(model, mask)
    far = divergence(model, tiny_llama(), windows)
    recover(model, dense, mask, tokenizer, windows, scope="layer", num_train_epochs=4, learning_rate=0.01, **PLAIN)
    assert divergence(model, tiny_llama(), windows) < 0.9 * far
    assert divergence(dense, tiny_llama(), windows) < 1e-6


@pytest.mark.parametrize("scope", ["full", "layer"])
def test_a_recovery_of_another_mask_does_not_go_on_in_the_same_folder(scope, tokenizer, windows, tmp_path):
    model, dense, mask = pruned_and_dense()
    recover(model, dense, mask, tokenizer, windows, tmp_path, scope=scope, **PLAIN)
    other = Mask({name: kept.flip(-1) for name, kept in mask.tensors.items()})
    model = tiny_llama()
    with pytest.raises(UsageError, match="holds a run with another `mask`"):
        recover(model, dense, other, tokenizer, windows, tmp_path, scope=scope, **PLAIN)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_architectures_are_recovered(family, scope, tokenizer):
    dense = build(family)
    model, mask = copy.deepcopy(dense), Mask(magnitudes(dense))
    windows = torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    before = copy_of(model)
    recover(model, dense, mask, tokenizer, windows, scope=scope, **PLAIN)
    names = moved(model, before) - (set(mask.tensors) if scope == "norms" else set())
    assert names
    for name, target in fit_mask(model, mask).items():
        assert not target.rows(target.weight.detach())[~mask.tensors[name]].any(), name
