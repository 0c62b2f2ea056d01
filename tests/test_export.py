"""Exports in every form, their check, model cards, and what the benchmark prints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file, save_file
from test_compact import magnitudes, prune
from test_prunable import build
from transformers import AutoModelForCausalLM

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.commands import export as export_command
from proxsparse.deploy import dense, masks
from proxsparse.deploy.check import check_sparsity
from proxsparse.deploy.dense import save_pruned
from proxsparse.deploy.sparse import CompactLinear
from proxsparse.mask import Mask, load_mask, save_mask
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import top2_mask


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 30)[None]).logits


def export(*flags):
    return console(["export", *map(str, flags)])


def test_the_dense_form_is_an_ordinary_checkpoint_bit_equal_to_the_base_times_the_mask(checkpoint, mask, tmp_path):
    assert export("--model", checkpoint, "--mask", mask, "--to", tmp_path / "out") == 0
    base, model = (AutoModelForCausalLM.from_pretrained(f) for f in (checkpoint, tmp_path / "out"))
    kept = load_mask(mask).tensors
    for name, weight in model.named_parameters():
        wanted = base.get_parameter(name)
        assert torch.equal(weight, torch.where(kept[name], wanted, 0.0) if name in kept else wanted)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config"} & set(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_streaming_by_shards_gives_what_pruning_in_memory_does(family, tokenizer, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    masks = {t.name: top2_mask(t.rows(t.weight.detach())) for t in find_prunable(model)}
    save_pruned(str(tmp_path / "base"), Mask(masks), tmp_path / "streamed")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").eval()
    assert torch.equal(logits(found), logits(prune(model).eval()))
    assert {p.name for p in (tmp_path / "base").iterdir()} <= {p.name for p in (tmp_path / "streamed").iterdir()}


def test_experts_are_exported_through_the_model(tokenizer, tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = ["--model", str(tmp_path / "base"), "--prune_method", "magnitude", "--save", str(tmp_path / "mask")]
    assert console(["prune", *flags]) == 0
    assert export("--model", tmp_path / "base", "--mask", tmp_path / "mask", "--to", tmp_path / "out") == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(found), logits(prune(model).eval()))


def test_the_mask_form_holds_one_bit_a_weight_and_hashes(checkpoint, mask, tmp_path):
    assert export("--model", checkpoint, "--mask", mask, "--form", "mask", "--to", tmp_path / "out") == 0
    again, first = load_mask(tmp_path / "out"), load_mask(mask)
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    record = json.loads((tmp_path / "out" / "mask.json").read_text())
    assert record["pattern"] == "2:4"
    assert record["base_model"] == checkpoint
    assert set(record["sha256"]) == set(first.tensors)


@pytest.mark.parametrize("form", ["dense", "compact", "mask"])
def test_what_is_written_can_be_read_by_whom_the_user_lets(checkpoint, mask, tmp_path, form):
    before = os.umask(0o027)
    try:
        assert export("--model", checkpoint, "--mask", mask, "--form", form, "--to", tmp_path / "out") == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert any(name.endswith(".safetensors") for name in modes)
    assert set(modes.values()) == {0o640}, modes


def test_the_compact_form_loads_dense_and_sparse(checkpoint, mask, tmp_path):
    assert export("--model", checkpoint, "--mask", mask, "--form", "compact", "--to", tmp_path / "compact") == 0
    assert export("--model", checkpoint, "--mask", mask, "--to", tmp_path / "dense") == 0
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval())
    assert torch.equal(logits(proxsparse.load(str(tmp_path / "compact"))), wanted)
    sparse = proxsparse.load(str(tmp_path / "compact"), sparse=True)
    assert isinstance(sparse.model.layers[0].mlp.up_proj, CompactLinear)
    torch.testing.assert_close(logits(sparse), wanted, rtol=1e-4, atol=1e-4)
    assert console(["check", "--model", str(tmp_path / "dense"), "--base", checkpoint]) == 0


def test_the_compact_form_with_int8_values_loads_dense_and_sparse(checkpoint, mask, tmp_path, capsys):
    flags = ["--model", checkpoint, "--mask", mask, "--form", "compact"]
    assert export(*flags, "--to", tmp_path / "exact") == 0
    assert export(*flags, "--to", tmp_path / "int8", "--quantize", "int8") == 0
    sizes = [sum(t.nbytes for t in load_file(tmp_path / n / "compact.safetensors").values()) for n in ("exact", "int8")]
    assert sizes[1] < 0.8 * sizes[0]
    wanted, dense = (logits(proxsparse.load(str(tmp_path / name))) for name in ("exact", "int8"))
    assert 0 < (dense - wanted).norm() < 0.02 * wanted.norm()
    sparse = proxsparse.load(str(tmp_path / "int8"), sparse=True)
    assert sparse.model.layers[0].mlp.up_proj.quantize == "int8"
    assert (logits(sparse) - dense).norm() < 1e-3 * dense.norm()
    card = (tmp_path / "int8" / "README.md").read_text()
    assert "quantised to int8" in card
    assert "compressed-tensors" not in card
    assert console(["check", "--model", str(tmp_path / "int8")]) == 0
    capsys.readouterr()
    assert console(["check", "--model", str(tmp_path / "int8"), "--base", checkpoint]) == 2
    assert "--base compares bit for bit" in capsys.readouterr().err
    bench = ["bench", "--prompt", "8", "--tokens", "2", "--repeat", "1"]
    assert console([*bench, "--model", str(tmp_path / "int8")]) == 0
    assert "14 linear layers are compact, with int8 values" in capsys.readouterr().out


def test_int8_values_are_not_quantised_again_but_may_become_dense(checkpoint, mask, tmp_path, capsys):
    flags = ["--mask", mask, "--form", "compact", "--quantize", "int8"]
    assert export("--model", checkpoint, *flags, "--to", tmp_path / "int8") == 0
    assert export("--model", tmp_path / "int8", *flags, "--to", tmp_path / "again") == 2
    assert "is quantised already (compact int8)" in capsys.readouterr().err
    assert export("--model", tmp_path / "int8", "--mask", mask, "--to", tmp_path / "dense") == 0
    dense, small = (logits(proxsparse.load(str(tmp_path / name)).eval()) for name in ("dense", "int8"))
    assert torch.equal(dense, small)
    assert "original weights are quantised; the kept ones" in (tmp_path / "dense" / "README.md").read_text()


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        (["--form", "mask"], (masks, "write_json")),
        (["--form", "mask"], (masks, "save_mask")),
        (["--form", "npz"], (masks.np, "savez_compressed")),
        (["--form", "compact"], (dense, "write_index")),
        (["--runtime", "vllm-torchao"], (dense, "write_runtime")),
    ],
)
def test_a_failure_in_the_middle_leaves_nothing_behind(flags, place, checkpoint, mask, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*place, lambda *args, **kwargs: raise_(OSError(28, "No space left on device")))
    assert export("--model", checkpoint, "--mask", mask, *flags, "--to", tmp_path / "out") == 1
    assert "The disk is full: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_mask_replaces_an_export_but_nothing_else(checkpoint, mask, tmp_path):
    flags = ["--model", checkpoint, "--mask", mask, "--to", tmp_path / "out"]
    assert export(*flags) == 0
    assert export(*flags, "--form", "mask") == 0
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {"README.md", "mask.json", "mask.safetensors"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    assert export(*flags[:-1], tmp_path / "mine", "--form", "mask") == 2


def multiply_npz(folder, state):
    """Prune the weights in place as MaskLLM's loader does."""
    for key, bits in np.load(folder / "mask_compressed.npz").items():
        weight = state[key.replace(".mask", "")]
        weight *= torch.from_numpy(np.unpackbits(bits)).float().view(*weight.shape)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_npz_form_is_unpacked_as_maskllm_does(family, tokenizer, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = ["--model", str(tmp_path / "base"), "--prune_method", "magnitude", "--save", str(tmp_path / "mask")]
    assert console(["prune", *flags]) == 0
    assert (
        export("--model", tmp_path / "base", "--mask", tmp_path / "mask", "--form", "npz", "--to", tmp_path / "o") == 0
    )
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    multiply_npz(tmp_path / "o", state)
    pruned = prune(model).state_dict()
    assert [name for name in pruned if not torch.equal(state[name], pruned[name])] == []


STREAM = """
import sys
from proxsparse.deploy.dense import save_pruned
from proxsparse.mask import load_mask
sys.path.insert(0, sys.argv[1])
from peaks import Sampler, status

mask, before = load_mask(sys.argv[3]), status("RssAnon")
with Sampler() as peaks:
    save_pruned(sys.argv[2], mask, sys.argv[4])
print(peaks.anonymous - before)
"""


@pytest.mark.slow  # a process of its own
def test_streaming_holds_about_one_shard(tokenizer, tmp_path):
    model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=4096)
    model.save_pretrained(tmp_path / "base", max_shard_size="18MB")
    tokenizer.save_pretrained(tmp_path / "base")
    save_mask(Mask({t.name: top2_mask(t.rows(t.weight.detach())) for t in find_prunable(model)}), tmp_path / "mask")
    sizes = [shard.stat().st_size for shard in (tmp_path / "base").glob("*.safetensors")]
    assert len(sizes) > 6
    folders = [Path(__file__).parent, *(tmp_path / name for name in ("base", "mask", "out"))]
    command = [sys.executable, "-c", STREAM, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Measured: 0.7 to 2.2 shards, with what is imported on the way. The model has nine.
    assert int(done.stdout.splitlines()[-1]) < 3 * max(sizes)


@pytest.fixture
def pruned(checkpoint, mask, tmp_path):
    save_pruned(checkpoint, load_mask(mask), tmp_path / "pruned")
    return tmp_path / "pruned"


def damage(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def first_zero(tensor):
    return tuple(int(i) for i in (tensor == 0).nonzero()[0])


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (UP, lambda w: w.__setitem__(first_zero(w), 1.0), "blocks are not 2:4, the first is row"),
        (UP, lambda w: w[0].mul_(1.0001), "kept weights differ from the base, the first at (0,"),
        ("model.norm.weight", lambda w: w[3].add_(1), "1 entries differ from the base, the first at (3,)"),
        ("model.embed_tokens.weight", lambda w: w[5, 0].neg_(), "1 entries differ from the base, the first at (5, 0)"),
    ],
)
def test_one_changed_weight_is_caught_and_named(name, change, sentence, pruned, checkpoint, capsys):
    assert console(["check", "--model", str(pruned), "--base", checkpoint]) == 0
    damage(pruned, name, change)
    assert console(["check", "--model", str(pruned), "--base", checkpoint]) == 1
    shown = capsys.readouterr()
    assert f"{name}: " in shown.out
    assert sentence in shown.out
    assert "fails the check" in shown.err


def test_a_minus_zero_is_no_pruned_weight(pruned, checkpoint):
    damage(pruned, UP, lambda w: w.__setitem__(first_zero(w), -0.0))
    counts, offenders = check_sparsity(str(pruned), checkpoint)
    assert counts["wrong_blocks"] == 0
    assert len(offenders) == 1


def test_a_dense_model_and_a_folder_without_weights_fail(checkpoint, tmp_path, capsys):
    assert console(["check", "--model", checkpoint]) == 1
    assert "blocks are not 2:4" in capsys.readouterr().out
    assert console(["check", "--model", str(tmp_path)]) == 2


def test_the_card_says_what_the_checkpoint_is(checkpoint, mask, tmp_path, corpus):
    results = tmp_path / "results.json"
    flags = ["--model", checkpoint, "--mask", str(mask), "--dataset", corpus, "--ctx_len", "32", "--max_windows", "3"]
    assert console(["apply", *flags, "--output", str(results)]) == 0
    assert export("--model", checkpoint, "--mask", mask, "--to", tmp_path / "out", "--results", results) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "2:4" in card.data.tags
    value = json.loads(results.read_text())["perplexity"][corpus]["perplexity"]
    for said in ("chosen by magnitude", "50% of its prunable weights", f"{value:.2f} +- ", "from_pretrained"):
        assert said in card.text


def test_pushing_uses_the_hub_client_and_says_what_is_missing(checkpoint, mask, tmp_path, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, name, exist_ok, private):
            assert private
            calls.append(name)

        def upload_folder(self, repo_id, folder_path):
            calls.append(folder_path)

    monkeypatch.setattr(export_command, "HfApi", Api)
    flags = ["--model", checkpoint, "--mask", mask, "--push_to_hub", "me/pruned"]
    assert export(*flags, "--to", tmp_path / "a") == 0
    assert calls == ["me/pruned", tmp_path / "a"]
    assert 'from_pretrained("me/pruned")' in (tmp_path / "a" / "README.md").read_text()

    def no_token(*args, **kwargs):
        raise LocalTokenNotFoundError("none")

    monkeypatch.setattr(export_command, "HfApi", lambda: SimpleNamespace(create_repo=no_token))
    assert export(*flags, "--to", tmp_path / "b") == 1
    assert "needs a token: log in with 'hf auth login'" in capsys.readouterr().err
    assert (tmp_path / "b" / "model.safetensors").is_file()


def test_folders_with_something_else_in_them_are_left_alone(checkpoint, mask, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert export("--model", checkpoint, "--mask", mask, "--to", tmp_path) == 2
    assert "holds something else" in capsys.readouterr().err


def test_the_bench_prints_dense_beside_sparse(pruned, capsys):
    assert console(["bench", "--model", str(pruned), "--prompt", "16", "--tokens", "4", "--repeat", "1"]) == 0
    shown = capsys.readouterr().out
    record = json.loads(shown.splitlines()[-1])
    assert record["sparse"]["weight_bytes"] < record["dense"]["weight_bytes"]
    assert all(value > 0 for row in ("dense", "sparse") for value in record[row].values())
    assert console(["bench", "--model", str(pruned), "--prompt", "500"]) == 2
    flags = ["--prompt", "8", "--tokens", "2", "--repeat", "1", "--quantize", "int8"]
    assert console(["bench", "--model", str(pruned), *flags]) == 0
    small = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert small["sparse"]["weight_bytes"] < record["sparse"]["weight_bytes"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured tensors need a CUDA device")
def test_semi_structured_tensors_give_the_same_logits(tokenizer, tmp_path, monkeypatch):
    from conftest import tiny_llama

    from proxsparse.deploy import sparse as module

    monkeypatch.setattr(module, "WORTHWHILE", 0.0)  # convert everything, faster or not

    model = tiny_llama(hidden_size=256, intermediate_size=512)
    save_pruned(model, Mask(magnitudes(model)), tmp_path / "pruned", tokenizer=tokenizer)
    model = prune(model).to("cuda", torch.float16).eval()
    sparse = proxsparse.load(str(tmp_path / "pruned"), sparse=True, device="cuda", dtype=torch.float16)
    assert type(sparse.model.layers[0].mlp.up_proj.weight.data).__name__.startswith("SparseSemiStructured")
    ids = torch.arange(1, 30, device="cuda")[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits.float()
        assert (sparse(input_ids=ids).logits.float() - want).norm() < 0.01 * want.norm()


def test_layers_left_out_of_the_pruning_stay_dense_when_a_model_runs_sparse(tmp_path, tokenizer):
    from conftest import tiny_llama

    model = tiny_llama()
    kept = {name: mask for name, mask in magnitudes(model).items() if "down_proj" not in name}
    save_pruned(model, Mask(kept), tmp_path / "pruned", tokenizer=tokenizer)
    sparse = proxsparse.load(str(tmp_path / "pruned"), sparse=True)
    kinds = {type(m).__name__ for name, m in sparse.named_modules() if name.endswith("down_proj")}
    assert kinds == {"Linear"}
    assert type(sparse.model.layers[0].mlp.up_proj).__name__ == "CompactLinear"
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        dense = proxsparse.load(str(tmp_path / "pruned"))(input_ids=ids).logits
        torch.testing.assert_close(sparse(input_ids=ids).logits, dense)


def test_a_model_without_a_tokenizer_is_saved_pruned(tmp_path):
    from conftest import tiny_llama

    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    save_mask(Mask(magnitudes(model), base_model=str(tmp_path / "base")), tmp_path / "mask.safetensors")
    flags = ["--model", str(tmp_path / "base"), "--mask", str(tmp_path / "mask.safetensors"), "--no_eval"]
    assert console(["apply", *flags, "--save", str(tmp_path / "pruned")]) == 0
    assert (tmp_path / "pruned" / "model.safetensors").is_file()


def test_a_pruned_model_is_exported_by_its_zeros(checkpoint, mask, tmp_path, capsys):
    proxsparse.save_pruned(checkpoint, load_mask(mask), tmp_path / "pruned")
    assert (
        console(["export", "--model", str(tmp_path / "pruned"), "--form", "compact", "--to", str(tmp_path / "c")]) == 0
    )
    found, wanted = (proxsparse.load(str(tmp_path / name)).state_dict() for name in ("c", "pruned"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert console(["export", "--model", checkpoint, "--to", str(tmp_path / "d")]) == 2
    assert "give a pruned model, or a mask" in capsys.readouterr().err


def test_destinations_that_can_not_be_written_are_refused_before_any_work(
    pruned, checkpoint, mask, corpus, tmp_path, capsys, monkeypatch
):
    assert export("--model", checkpoint, "--mask", mask, "--form", "mask", "--to", tmp_path / "small") == 0
    inside, file = tmp_path / "small" / "mask.safetensors", tmp_path / "taken"
    file.write_text("mine")
    base, text = ["--model", checkpoint], ["--dataset", corpus, "--ctx_len", "32"]
    commands = {
        "is read, so it can't be replaced": ["export", "--model", str(pruned), "--to", str(pruned)],
        f"{inside.parent} is read": [
            "export",
            "--model",
            checkpoint,
            "--mask",
            str(inside),
            "--to",
            str(inside.parent),
        ],
        "is a file; name a new folder": ["apply", *base, "--mask", str(mask), "--no_eval", "--save", str(file)],
        "is a file; name a folder": ["prune", *base, *text, "--prune_method", "wanda", "--save", str(file)],
        "is a folder: name a file": ["eval", *base, *text, "--output", str(tmp_path)],
    }
    before = {path.name: path.read_bytes() for path in pruned.iterdir()}
    monkeypatch.setattr("proxsparse.model.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    for sentence, command in commands.items():
        assert console(command) == 2
        assert sentence in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in pruned.iterdir()} == before
    assert file.read_text() == "mine"


def test_a_link_to_a_folder_is_written_into_that_folder(checkpoint, mask, tmp_path):
    large_disk, link = tmp_path / "disk", tmp_path / "link"
    large_disk.mkdir()
    link.symlink_to(large_disk)
    for _ in range(2):  # the second time it replaces what it wrote
        assert export("--model", checkpoint, "--mask", mask, "--to", link) == 0
        assert link.is_symlink()
        assert (large_disk / "model.safetensors").is_file()


def test_a_checkpoint_that_can_not_be_used_fails_the_check(pruned, capsys):
    file = pruned / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert console(["check", "--model", str(pruned)]) == 1
    assert "model.norm.weight: is not in the files" in capsys.readouterr().out
    save_file(tensors | {"model.norm.weight": norm * torch.nan}, file, metadata={"format": "pt"})
    assert console(["check", "--model", str(pruned)]) == 1
    assert "model.norm.weight: has values that are not finite" in capsys.readouterr().out


def test_a_folder_that_can_not_be_replaced_stays(checkpoint, mask, tmp_path, monkeypatch):
    assert export("--model", checkpoint, "--mask", mask, "--to", tmp_path / "out") == 0
    before, replace = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}, os.replace

    def broken(source, target):
        if Path(source).name == "out" and Path(target) == tmp_path / "out":
            raise OSError("Directory not empty")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    assert export("--model", checkpoint, "--mask", mask, "--to", tmp_path / "out") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("added", ["notes.md", "checkpoint-500/optimizer.pt"])
def test_what_was_added_to_an_export_is_never_removed(added, pruned, checkpoint, mask, capsys):
    mine = pruned / added
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert export("--model", checkpoint, "--mask", mask, "--to", pruned) == 2
    assert f"holds {added}, which was added" in capsys.readouterr().err
    mine.unlink()
    assert export("--model", checkpoint, "--mask", mask, "--to", pruned) == 0


@pytest.mark.parametrize("named", ["float16", "bfloat16"])
def test_compact_files_of_float32_give_float32_whatever_the_configuration_says(named, tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"dtype": named}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path / "base")
    mask = Mask(magnitudes(tiny_llama()))
    for form in ("dense", "compact"):
        save_pruned(str(tmp_path / "base"), mask, tmp_path / form, form=form)
    dense, compact = (proxsparse.load(str(tmp_path / form), dtype=torch.float32) for form in ("dense", "compact"))
    assert all(torch.equal(p, compact.get_parameter(name)) for name, p in dense.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_dtype_rounds_weights_and_not_what_is_computed_from_the_configuration(dtype, pruned, tmp_path):
    save_pruned(str(pruned), load_pruned_mask(pruned), tmp_path / "small", form="compact")
    plain, compact = (proxsparse.load(str(folder), dtype=dtype) for folder in (pruned, tmp_path / "small"))
    ours, theirs = (model.model.rotary_emb.inv_freq for model in (compact, plain))
    assert torch.equal(ours, theirs)
    assert ours.dtype == torch.float32
    ids = torch.arange(1, 90)[None]
    with torch.no_grad():
        assert torch.equal(compact(input_ids=ids).logits, plain(input_ids=ids).logits)


def load_pruned_mask(folder):
    return proxsparse.mask_of_pruned(proxsparse.load_model(str(folder)))
