"""What is saved is what was given, minus the pruned weights: byte for byte, from every place and under every name."""

import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as hf
from conftest import byte_tokenizer, tiny_llama
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_prunable import SIZES, build

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.commands import groups
from proxsparse.commands import recover as recover_command
from proxsparse.deploy.check import check_sparsity
from proxsparse.deploy.dense import save_pruned
from proxsparse.errors import RunError, UsageError
from proxsparse.mask import Mask, apply_mask, load_mask
from proxsparse.model import hub as hub_module
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.hub import commit_of
from proxsparse.model.hub_errors import clear_errors
from proxsparse.model.layout import Layout
from proxsparse.model.loading import empty_model, load_config, load_model, load_tokenizer
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.pattern import Pattern
from proxsparse.operator.prox import top2_mask

SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def run(*words):
    assert console([str(word) for word in words]) == 0


def tensors_of(folder):
    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def as_the_hub_has_it(folder, **changes):
    """Give a folder the configuration of a repository that was written with transformers 4."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if rope and "full_attention" in rope:  # Gemma 3
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    elif rope:
        config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.40.1"
    (folder / "config.json").write_text(json.dumps(config | changes, indent=1))


@pytest.fixture
def llama3(tmp_path):
    """A tiny Llama 3 as on the Hub: rope_theta, bfloat16 with float32 norms, no metadata in its file, a licence."""
    folder = tmp_path / "llama3"
    tiny_llama(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}).to(torch.bfloat16).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    as_the_hub_has_it(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "LICENSE").write_text("mine")
    (folder / "extra").mkdir()
    (folder / "extra" / "chat.jinja").write_text("{{ messages }}")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "norm" in name:
            tensors[name] = torch.rand_like(tensors[name], dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors")  # no metadata
    return folder


def magnitude_mask(base, folder):
    run("prune", "--model", base, "--prune_method", "magnitude", "--save", folder)
    return load_mask(folder)


def assert_only_pruned(base, saved, mask):
    """The independent rule: small files byte for byte, tensors bit for bit, pruned entries +0.0."""
    for path in base.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and not path.name.startswith("."):
            assert (saved / path.relative_to(base)).read_bytes() == path.read_bytes(), path
    before, after = tensors_of(base), tensors_of(saved)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        wanted = tensor.masked_fill(~mask.tensors[name], 0.0) if name in mask.tensors else tensor
        assert torch.equal(bits(after[name]), bits(wanted)), name


@pytest.mark.parametrize("way", ["export", "apply", "prune", "library", "in memory"])
def test_the_base_stays_as_it_is_but_for_the_pruned_weights(way, llama3, tmp_path):
    mask, out = magnitude_mask(llama3, tmp_path / "mask"), tmp_path / "out"
    if way == "export":
        run("export", "--model", llama3, "--mask", tmp_path / "mask", "--to", out)
    elif way == "apply":
        run("apply", "--model", llama3, "--mask", tmp_path / "mask", "--save", out, "--no_eval", "--dtype", "float32")
    elif way == "prune":
        run("prune", "--model", llama3, "--prune_method", "magnitude", "--save_model", out)
    elif way == "library":
        save_pruned(str(llama3), mask, out)
    else:
        save_pruned(load_model(str(llama3)), mask, out)
    assert_only_pruned(llama3, out, mask)
    assert "bit for bit" in (out / "README.md").read_text()
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    run("check", "--model", out, "--base", llama3)


def test_updated_weights_replace_only_their_own_tensors(llama3, corpus, tmp_path):
    flags = ["--dataset", corpus, "--ctx_len", 32, "--nsamples", 8, "--dtype", "float32", "--bf16", "false"]
    run("prune", "--model", llama3, "--prune_method", "sparsegpt", *flags, "--save_model", tmp_path / "out")
    before, after = tensors_of(llama3), tensors_of(tmp_path / "out")
    pruned = {target.name for target in find_prunable(tiny_llama())}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(bits(after[name]), bits(tensor)) == (name not in pruned)
    assert (tmp_path / "out" / "config.json").read_bytes() == (llama3 / "config.json").read_bytes()
    assert check_sparsity(str(tmp_path / "out"))[1] == []
    assert "updated by sparsegpt" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_was_trained_in_memory_is_saved_with_its_own_values(llama3, tmp_path):
    mask, model = magnitude_mask(llama3, tmp_path / "mask"), load_model(str(llama3))
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    save_pruned(model, mask, tmp_path / "out")
    before, after = tensors_of(llama3), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])} - set(mask.tensors)
    assert changed == {"model.embed_tokens.weight"}
    assert torch.equal(after["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_a_model_without_files_says_so_in_its_card(tmp_path, tokenizer):
    model = tiny_llama()
    mask = Mask({t.name: top2_mask(t.weight.detach()) for t in find_prunable(model)})
    save_pruned(model, mask, tmp_path / "out", tokenizer=tokenizer)
    assert "has no files to copy from" in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(load_model(str(tmp_path / "out")).lm_head.weight, model.lm_head.weight)


@pytest.fixture
def hub(llama3, tmp_path, monkeypatch):
    """The same model as org/tiny in a Hub cache."""
    cache = tmp_path / "cache"
    repository = cache / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(path for path in llama3.iterdir() if path.is_file()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "org/tiny"


@pytest.fixture
def revisions(hub, llama3, tmp_path):
    """Folder of another model, and a branch of org/tiny in the cache that holds it: pruned, and of another config."""
    other = tmp_path / "other"
    shutil.copytree(llama3, other)
    model = load_model(str(llama3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    model.config.rms_norm_eps = 0.05
    model.save_pretrained(other)
    targets = find_prunable(model)
    mask = Mask({t.name: Pattern(4, 8).mask(t.rows(t.weight.detach()).float().abs()) for t in targets}, "4:8")
    proxsparse.save_pruned(str(other), mask, tmp_path / "branch")
    repository = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(tmp_path / "branch", repository / "snapshots" / "def456")
    (repository / "refs" / "v2").write_text("def456")
    return tmp_path / "branch"


def test_a_revision_is_itself_in_whatever_is_made_of_it(hub, revisions, corpus, tmp_path):
    branch = ["--model", hub, "--revision", "v2"]
    run("prune", *branch, "--prune_method", "magnitude", "--save", tmp_path / "mask", "--save_model", tmp_path / "one")
    run("apply", *branch, "--mask", tmp_path / "mask", "--save", tmp_path / "two", "--no_eval")
    run("export", *branch, "--mask", tmp_path / "mask", "--to", tmp_path / "three")
    run("export", "--model", revisions, "--mask", tmp_path / "mask", "--to", tmp_path / "wanted")
    for made in ("one", "two", "three"):
        for file in ("config.json", "tokenizer.json"):
            assert (tmp_path / made / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()
        ours, theirs = tensors_of(tmp_path / made), tensors_of(tmp_path / "wanted")
        assert all(torch.equal(bits(ours[name]), bits(theirs[name])) for name in theirs)
    assert load_config(str(tmp_path / "one")).rms_norm_eps == 0.05
    model = load_model(hub, revision="v2")
    assert proxsparse.mask_of_pruned(model).pattern == Pattern(4, 8)
    assert commit_of(model) == "def456"
    assert commit_of(load_model(hub)) == "abc123"


def test_check_reads_the_revisions_of_model_and_base(hub, revisions, llama3, tmp_path, capsys):
    check = ["check", "--model", hub, "--pattern", "4:8"]
    run(*check, "--revision", "v2")
    run(*check, "--revision", "v2", "--base", tmp_path / "other")
    assert console([*check, "--base", str(tmp_path / "other")]) == 1  # the main branch is dense
    assert console(["check", "--model", str(revisions), "--pattern", "4:8", "--base", hub]) == 1
    run("check", "--model", revisions, "--pattern", "4:8", "--base", hub, "--base_revision", "v2")
    assert console([*check, "--base_revision", "v2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --base_revision is that of a --base: give one."
    assert console(["check", "--model", str(revisions), "--base", hub, "--revision", "v2"]) == 2
    assert "error: --revision is that of --model, which is not on the Hub: is" in capsys.readouterr().err


def test_the_teacher_of_a_recovery_is_of_its_own_revision(hub, revisions, corpus, tmp_path, monkeypatch):
    asked = []

    def loaded(name, **options):
        asked.append((name, options["revision"]))
        return load_model(name, **options)

    for module in (groups, recover_command):
        monkeypatch.setattr(module, "load_model", loaded)
    flags = ["--dataset", corpus, "--ctx_len", "32", "--samples", "2", "--device", "cpu", "--scope", "norms"]
    branch = ["--model", hub, "--revision", "v2"]
    for number, (base, wanted) in enumerate(
        (
            (["--base", hub], (hub, None)),
            (["--base", hub, "--base_revision", "abc123"], (hub, "abc123")),
            (["--base", str(tmp_path / "other")], (str(tmp_path / "other"), None)),
        )
    ):
        asked.clear()
        run("recover", *branch, *base, *flags, "--to", tmp_path / f"out{number}")
        assert asked == [(hub, "v2"), wanted]


def test_a_wrong_revision_or_name_is_told_as_it_is(hub, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="they are of another `revision`"):
        load_model(hub, revision="nosuch")
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model(hub).config.vocab_size == load_model(str(tmp_path / "llama3")).config.vocab_size
    with pytest.raises(UsageError, match="There is no folder org/none; for a Hub id of that name, work in another"):
        load_model("org/none")


def test_the_hub_is_asked_again_unless_it_gave_no_answer(hub, monkeypatch):
    asked = []

    def refuse(kind):
        def cached_file(name, file, **options):
            asked.append(name)
            error = kind.__new__(kind)
            error.args = ("no",)
            raise OSError("transformers' own") from error

        return cached_file

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "_silent_since", {})
    for kind, times in ((GatedRepoError, 2), (LocalEntryNotFoundError, 1)):
        asked.clear()
        monkeypatch.setattr(hub_module, "cached_file", refuse(kind))
        assert hub_module.hub_file(hub, "none.json") is None
        assert hub_module.hub_file("org/other", "none.json") is None
        assert len(asked) == times
    assert hub_module.hub_file(hub, "config.json").is_file()  # from the cache


def test_what_the_hub_answers_is_told_apart():
    text = "If you are trying to access a private or gated repo, make sure you are authenticated."
    for kind, sentence in (
        (RepositoryNotFoundError, "There is no model org/none"),
        (GatedRepoError, "The model org/none is gated"),
        (RevisionNotFoundError, "org/none has no such revision"),
    ):
        error = kind.__new__(kind)
        error.args = (text,)
        with pytest.raises(RunError, match=sentence), clear_errors("org/none"):
            raise error
        with pytest.raises(RunError, match=sentence.replace("model", "adapter")), clear_errors("org/none", "adapter"):
            raise error


def test_a_shard_that_the_cache_lacks_is_named(hub, tmp_path):
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / "abc123"
    for path in snapshot.glob("*.safetensors*"):
        path.unlink()
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for path in (tmp_path / "sharded").glob("*.safetensors*"):
        shutil.copy(path, snapshot)
    gone = sorted(snapshot.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(RunError, match=f"The cache lacks {gone.name} of org/tiny"):
        load_model(hub)


@pytest.mark.parametrize("way", ["export", "apply", "prune"])
def test_a_hub_id_is_streamed_from_the_cache(way, hub, llama3, tmp_path):
    mask, out = magnitude_mask(hub, tmp_path / "mask"), tmp_path / "out"
    if way == "export":
        run("export", "--model", hub, "--mask", tmp_path / "mask", "--to", out)
    elif way == "apply":
        run("apply", "--model", hub, "--mask", tmp_path / "mask", "--save", out, "--no_eval")
    else:
        run("prune", "--model", hub, "--prune_method", "magnitude", "--save_model", out)
    shutil.rmtree(llama3 / "extra")  # repositories in the cache are flat here
    assert_only_pruned(llama3, out, mask)
    run("check", "--model", out, "--base", hub)
    run("check", "--model", out, "--base", llama3)


def mixture(family, folder):
    """A mixture model as the Hub has it: experts one by one."""
    build(family).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    assert any(".experts.3." in name for name in tensors_of(folder))
    return folder


@pytest.mark.parametrize("form", ["dense", "compact"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_masked_one_by_one_as_the_files_have_them(family, form, tmp_path):
    base = mixture(family, tmp_path / "base")
    mask, out = magnitude_mask(base, tmp_path / "mask"), tmp_path / "out"
    run("export", "--model", base, "--mask", tmp_path / "mask", "--to", out, "--form", form)
    stacked = "model.layers.1.mlp.experts.gate_up_proj"
    kept = mask.tensors[stacked][2]  # of expert 2: (2 I, H), gate above up
    half = len(kept) // 2
    inner = "block_sparse_moe.experts.2.w{}" if family == "mixtral" else "mlp.experts.2.{}_proj"
    names = (1, 3) if family == "mixtral" else ("gate", "up")
    before, after = Checkpoint(base).tensors, Checkpoint(out).tensors
    assert before.keys() == after.keys()
    for name, rows in zip(names, (kept[:half], kept[half:]), strict=True):
        key = f"model.layers.1.{inner.format(name)}.weight"
        assert torch.equal(after[key].read(), before[key].read().masked_fill(~rows, 0.0))
    wanted = load_model(str(base))
    apply_mask(wanted, mask)
    found = proxsparse.load(str(out)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())
    run("check", "--model", out, "--base", base)
    if form == "compact":
        sizes = [sum(p.stat().st_size for p in folder.glob("*.safetensors")) for folder in (base, out)]
        assert sizes[1] < 0.8 * sizes[0]


def test_one_changed_weight_of_an_expert_is_found(tmp_path):
    base = mixture("mixtral", tmp_path / "base")
    magnitude_mask(base, tmp_path / "mask")
    run("export", "--model", base, "--mask", tmp_path / "mask", "--to", tmp_path / "out")
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    path = next(p for p in sorted((tmp_path / "out").glob("*.safetensors")) if name in load_file(p))
    tensors = load_file(path)
    tensors[name][0, 0:4] = 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    _, offenders = check_sparsity(str(tmp_path / "out"), str(base))
    assert offenders[0] == (
        "model.layers.0.mlp.experts.down_proj: 1 blocks are not 2:4, the first is expert 3, row 0, block 0"
    )
    assert "4 kept weights differ from the base, the first at (3, 0, 0)" in offenders[1]


def vision(kind):
    text = SIZES | {"head_dim": 8}
    if kind == "gemma3":
        tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        tower |= {"image_size": 16, "patch_size": 8}
        return hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
        )
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    text |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    tower = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    return hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(text_config=text, vision_config=tower))


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_a_multimodal_checkpoint_keeps_its_vision_tower_and_its_class(kind, tmp_path):
    torch.manual_seed(0)
    vision(kind).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    as_the_hub_has_it(tmp_path / "base")
    mask = magnitude_mask(tmp_path / "base", tmp_path / "mask")
    run("apply", "--model", tmp_path / "base", "--mask", tmp_path / "mask", "--save", tmp_path / "out", "--no_eval")
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert any("vis" in name for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(mask.tensors)
    assert all("language_model" in name for name in changed)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    run("check", "--model", tmp_path / "out", "--base", tmp_path / "base")


def test_parameters_that_a_model_draws_by_itself_are_those_of_the_files(tmp_path):
    """DiffLlama draws its lambdas on the CPU even where a model without values is asked for."""
    base, sizes = tmp_path / "base", {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
    config = hf.DiffLlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    hf.DiffLlamaForCausalLM(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    assert all(p.is_meta for p in empty_model(str(base)).parameters())
    mask = magnitude_mask(base, tmp_path / "mask")
    run("export", "--model", base, "--mask", tmp_path / "mask", "--to", tmp_path / "pruned")
    assert_only_pruned(base, tmp_path / "pruned", mask)


def test_hub_names_of_gpt2_are_found(tmp_path):
    model = build("gpt2", vocab_size=257)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    mask = magnitude_mask(tmp_path / "base", tmp_path / "mask")
    for form in ("dense", "compact"):
        run(
            "export", "--model", tmp_path / "base", "--mask", tmp_path / "mask", "--to", tmp_path / form, "--form", form
        )
        run("check", "--model", tmp_path / form, "--base", tmp_path / "base")
        found = Checkpoint(tmp_path / form).tensors
        assert found.keys() == bare.keys()
        kept = mask.tensors["transformer.h.1.mlp.c_fc.weight"].T  # Conv1D: (in, out)
        weight = bare["h.1.mlp.c_fc.weight"]
        assert torch.equal(found["h.1.mlp.c_fc.weight"].read(), weight.masked_fill(~kept, 0.0))


def test_a_head_that_the_configuration_calls_tied_is_kept_where_the_file_has_another(llama3, tmp_path):
    config = json.loads((llama3 / "config.json").read_text())
    (llama3 / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    magnitude_mask(llama3, tmp_path / "mask")
    run("export", "--model", llama3, "--mask", tmp_path / "mask", "--form", "compact", "--to", tmp_path / "out")
    ids = torch.arange(1, 30)[None]
    wanted = hf.AutoModelForCausalLM.from_pretrained(llama3)
    apply_mask(wanted, load_mask(tmp_path / "mask"))
    assert not torch.equal(wanted.lm_head.weight, wanted.model.embed_tokens.weight)
    with torch.no_grad():
        assert torch.equal(proxsparse.load(str(tmp_path / "out"))(ids).logits, wanted.eval()(ids).logits)
    run("check", "--model", tmp_path / "out", "--base", llama3)


def test_the_single_file_wins_over_an_older_index(llama3, tmp_path):
    old = tmp_path / "old"
    tiny_llama(seed=1).to(torch.bfloat16).save_pretrained(old, max_shard_size="20KB")
    for path in old.glob("model*"):
        shutil.copy(path, llama3 / path.name)
    single = load_file(llama3 / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(hf.AutoModelForCausalLM.from_pretrained(llama3).get_parameter(name), single[name])
    assert torch.equal(Checkpoint(llama3).tensors[name].read(), single[name])
    mask = magnitude_mask(llama3, tmp_path / "mask")
    run("export", "--model", llama3, "--mask", tmp_path / "mask", "--to", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], single[name] * mask.tensors[name])


def test_a_configuration_without_a_dtype_takes_that_of_the_first_file(llama3, capsys):
    config = json.loads((llama3 / "config.json").read_text())
    del config["torch_dtype"]
    (llama3 / "config.json").write_text(json.dumps(config))
    assert load_config(str(llama3)).dtype == torch.bfloat16 == hf.AutoModelForCausalLM.from_pretrained(llama3).dtype
    run("plan", "--model", llama3, "--ctx_len", 64)
    assert "bfloat16 weights" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "qwen3_moe", "phi3", "opt", "gpt_neox"])
def test_the_layout_reads_what_transformers_loads(family, tmp_path):
    build(family).save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    layout = Layout(Checkpoint(tmp_path / "base").tensors, empty_model(str(tmp_path / "base")))
    readers = layout.readers()
    for name, parameter in model.named_parameters():
        assert torch.equal(readers[name](), parameter), name
    for group in layout.groups:  # and back
        files = {name: layout.tensors[name].read() for name in group.shapes}
        again = group.stored(group.convert(files), 0.0)
        assert all(torch.equal(again[name], tensor) for name, tensor in files.items())


def test_the_original_weights_of_experts_are_read_from_the_files(tmp_path, caplog):
    from proxsparse.learning.copies import OriginalWeights

    base = mixture("mixtral", tmp_path / "base")
    targets = find_prunable(load_model(str(base)))
    original = OriginalWeights(targets, "checkpoint", str(base))
    assert not original._kept
    assert all(torch.equal(original.of(target), target.weight) for target in targets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{}"), "is a LoRA adapter .*merge it into its base model"),
        (lambda f: (f / "m.Q4.gguf").write_bytes(b"GGUF"), r"no config.json but 1 .gguf: give the file, .*m.Q4.gguf"),
    ],
)
def test_folders_of_another_kind_say_what_to_give(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_model(str(tmp_path))


def test_an_adapter_in_the_cache_is_said_to_be_one(hub, tmp_path):
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / "abc123"
    (snapshot / "config.json").rename(snapshot / "adapter_config.json")
    with pytest.raises(UsageError, match="org/tiny is a LoRA adapter .*merge it"):
        load_model(hub)


def test_one_file_of_a_checkpoint_says_what_to_give(llama3):
    with pytest.raises(UsageError, match="is one file of a checkpoint, .*give its folder, .*llama3"):
        load_model(str(llama3 / "model.safetensors"))
    with pytest.raises(UsageError, match="There is no file nothing.GGUF"):
        load_model("nothing.GGUF")


def test_gguf_is_known_by_its_ending_in_either_case(tmp_path):
    (tmp_path / "M.GGUF").write_bytes(b"GGUF but damaged")
    with pytest.raises(RunError, match=r"The model .*M.GGUF can't be loaded"):
        load_model(str(tmp_path / "M.GGUF"))


def test_a_package_that_model_code_imports_is_named(llama3):
    code = "import flash_attn_of_mars\nfrom transformers import LlamaForCausalLM as Mine\n"
    (llama3 / "modeling_mine.py").write_text(code)
    config = json.loads((llama3 / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (llama3 / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="needs the package flash_attn_of_mars, which is not installed"):
        load_model(str(llama3), trust_remote_code=True)


def test_a_multimodal_model_without_a_text_class_is_said_to_be_one(tmp_path):
    text = {"model_type": "llama"} | SIZES
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"is a multimodal model \(LlavaConfig\).*give its text model"):
        load_model(str(tmp_path))


def test_an_encoder_decoder_is_no_causal_language_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    with pytest.raises(UsageError, match="is no causal language model"):
        load_config(str(tmp_path))


def test_a_sentencepiece_file_names_the_packages_that_read_it(llama3, monkeypatch):
    from proxsparse.model import hub_errors

    for path in llama3.glob("tokenizer*"):
        path.unlink()
    (llama3 / "tokenizer.model").write_bytes(b"\xff\xff damaged")
    (llama3 / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(hub_errors, "installed", lambda module: module == "numpy")
    with pytest.raises(
        RunError, match="SentencePiece file .*sentencepiece and protobuf read: pip install sentencepiece"
    ):
        load_tokenizer(str(llama3))


def test_a_sentencepiece_file_is_read(llama3, tmp_path):
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    for path in llama3.glob("tokenizer*"):
        path.unlink()
    (tmp_path / "text").write_text("\n".join(f"the quick brown fox number {i}" for i in range(200)))
    options = {"vocab_size": 60, "model_type": "bpe", "minloglevel": 2}
    spm.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(llama3 / "tokenizer"), **options)
    (llama3 / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    wanted = spm.SentencePieceProcessor(model_file=str(llama3 / "tokenizer.model")).encode("the quick brown fox")
    assert load_tokenizer(str(llama3))("the quick brown fox", add_special_tokens=False).input_ids == wanted


def test_a_missing_shard_is_named(llama3, tmp_path, mask, capsys):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    gone = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    gone.unlink()
    for command in (["export", "--to", tmp_path / "out"], ["apply", "--save", tmp_path / "out", "--no_eval"]):
        words = [command[0], "--model", tmp_path / "base", "--mask", mask, *command[1:]]
        assert console([str(word) for word in words]) == 1
        assert gone.name in capsys.readouterr().err


def test_a_compact_export_is_read_by_its_hub_id(llama3, hub, tmp_path, monkeypatch, corpus):
    mask = magnitude_mask(llama3, tmp_path / "mask")
    compact = tmp_path / "compact"
    run("export", "--model", llama3, "--mask", tmp_path / "mask", "--form", "compact", "--to", compact)
    remote = shutil.copytree(compact, tmp_path / "remote")
    (remote / "compact.safetensors").rename(remote / "compact-00001-of-00001.safetensors")
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / "abc123"
    asked = []

    def download(name, *, revision, allow_patterns):
        """Of the repository, what is wanted; as the Hub's client does."""
        asked.append(allow_patterns)
        for path in remote.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot / path.name)
        return str(snapshot)

    monkeypatch.setattr("proxsparse.model.hub.snapshot_download", download)
    for path in snapshot.iterdir():
        path.unlink()
    for name in ("config.json", "compact.json", "generation_config.json"):
        shutil.copy(remote / name, snapshot / name)
    wanted = load_model(str(llama3))
    apply_mask(wanted, mask)
    for _ in range(2):  # downloaded, then from the cache
        found = proxsparse.load(hub).state_dict()
        assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in wanted.state_dict().items())
    assert len(asked) == 2
    (snapshot / "compact-00001-of-00001.safetensors").rename(snapshot / "compact-00001-of-00002.safetensors")
    assert Checkpoint.find(hub) is None  # half of it: the download was interrupted
    (snapshot / "compact-00001-of-00002.safetensors").rename(snapshot / "compact-00001-of-00001.safetensors")
    run("check", "--model", hub, "--base", llama3)
    run("eval", "--model", hub, "--dataset", corpus, "--ctx_len", 32, "--max_windows", 1)
    run("export", "--model", hub, "--mask", tmp_path / "mask", "--to", tmp_path / "dense")
    dense = tensors_of(tmp_path / "dense")
    assert all(torch.equal(dense[name].to(tensor.dtype), tensor) for name, tensor in found.items())
