"""Bad days: damaged files, wrong models and texts, full disks. One clear sentence, the exit code, no half output."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import TEXT, byte_tokenizer, tiny_llama
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from proxsparse.__main__ import main as console
from proxsparse.mask import FORMAT

NORMAL = {"ctx_len": "32"}


# Damaged models: each takes a folder that holds a good checkpoint and spoils it.


def truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def garbage_weights(folder):
    (folder / "model.safetensors").write_bytes(os.urandom(4096))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama", ')


def unknown_architecture(folder):
    change_config(folder, model_type="perceptron9000", architectures=["Perceptron"])


def encoder(folder):
    change_config(folder, model_type="bert", architectures=["BertModel"])


def other_shapes(folder):
    change_config(folder, intermediate_size=128)


def needs_code(folder):
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('this code ran')")


def no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def nan_weights(folder):
    change_weight(folder, "model.layers.1.mlp.up_proj.weight", lambda w: w.fill_(float("nan")))


def infinite_weights(folder):
    change_weight(folder, "model.layers.0.self_attn.q_proj.weight", lambda w: w[0, 0].fill_(float("inf")))


def zero_weights(folder):
    change_weight(folder, "model.layers.0.mlp.down_proj.weight", lambda w: w.zero_())


def odd_width(folder):
    tiny_llama(hidden_size=32, intermediate_size=66).save_pretrained(folder)


def escaping_index(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    names = load_file(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weight(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = [
    # (damage, command, exit code, what the sentence says)
    (truncated_weights, "eval", 1, "damaged"),
    (truncated_weights, "learn", 1, "damaged"),
    (truncated_weights, "check", 1, "damaged"),
    (empty_weights, "eval", 1, "damaged"),
    (garbage_weights, "prune", 1, "damaged"),
    (garbage_weights, "export", 1, "damaged"),
    (no_weights, "eval", 1, "no safetensors weights"),
    (no_weights, "check", 2, "must be a checkpoint folder with safetensors"),
    (only_pickle, "eval", 1, "pickle files can run code"),
    (only_pickle, "learn", 1, "pickle files can run code"),
    (only_pickle, "export", 1, "pickle files can run code"),
    (no_config, "eval", 2, "has no config.json"),
    (no_config, "plan", 2, "has no config.json"),
    (broken_config, "eval", 1, "can't be loaded"),
    (broken_config, "plan", 1, "can't be loaded"),
    (unknown_architecture, "eval", 1, "can't be loaded"),
    (unknown_architecture, "learn", 1, "can't be loaded"),
    (encoder, "eval", 1, "lacks"),
    (other_shapes, "eval", 1, "can't be loaded"),
    (needs_code, "eval", 1, "needs its own code"),
    (needs_code, "learn", 1, "needs its own code"),
    (needs_code, "plan", 1, "needs its own code"),
    (no_tokenizer, "eval", 1, "can't be loaded"),
    (broken_tokenizer, "eval", 1, "can't be loaded"),
    (nan_weights, "eval", 1, "loss is not finite"),
    (nan_weights, "prune", 1, "layers.1.mlp.up_proj.weight has NaN"),
    (nan_weights, "learn", 1, "not finite"),
    (infinite_weights, "prune", 1, "layers.0.self_attn.q_proj.weight has NaN or infinite entries"),
    (infinite_weights, "learn", 1, "not finite"),
    (zero_weights, "learn", 2, "is zero, or nearly so, so it has no scale"),
    (odd_width, "prune", 2, "not a multiple of 4"),
    (odd_width, "learn", 2, "Leave them out with --exclude"),
    (escaping_index, "eval", 1, "outside of its folder"),
    (escaping_index, "learn", 1, "outside of its folder"),
]


def flags_for(command, model, corpus, out, mask):
    common = {"model": model, "dataset": corpus, "ctx_len": "32"}
    flags = {
        "eval": common | {"output": out / "result.json"},
        "learn": common | {"samples": "4", "output_dir": out / "run", "bf16": "false", "use_cpu": "true"},
        "plan": common | {"output_dir": out / "run"},
        "prune": common | {"prune_method": "wanda", "nsamples": "2", "save": out / "mask"},
        "apply": common | {"mask": mask, "save": out / "pruned"},
        "check": {"model": model},
        "export": {"model": model, "mask": mask, "to": out / "export"},
    }[command]
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def assert_one_sentence(capsys, sentence):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert sentence in lines[0], lines[0]
    assert "Traceback" not in error


def results_in(folder):
    """Files a user would take for a result."""
    wanted = ("mask.safetensors", "result.json", "model.safetensors", "run.json")
    return [p for p in folder.rglob("*") if p.name in wanted]


@pytest.mark.parametrize(("damage", "command", "code", "sentence"), MODELS)
def test_a_damaged_model(damage, command, code, sentence, checkpoint, corpus, mask, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    damage(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    assert console([command, *flags_for(command, tmp_path / "model", corpus, out, mask)]) == code
    assert_one_sentence(capsys, sentence)
    assert results_in(out) == []


# (file, content, what the sentence says)
TEXTS = [
    ("empty.txt", b"", "there is no text in"),
    ("blank.txt", b" \n\n ", "there is no text in"),
    ("bytes.txt", bytes(range(256)) * 20, "is not UTF-8 text (byte 128)"),
    ("latin.txt", "caf\xe9 ".encode("latin-1") * 500, "is not UTF-8 text (byte 3)"),
    ("marked.txt", b"\xff\xfe\xfa broken", "is not UTF-8 text (byte 0)"),
    ("zero.txt", b"binary\0text", "is a binary file"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', "is not a readable json file"),
    ("array.json", b"[1, 2", "is not a readable json file"),
    ("fields.jsonl", b'{"body": "a"}\n', "needs a column 'text', and has body"),
    ("cut.json.gz", b"\x1f\x8b\x08\x00garbage", "is not a readable gz file"),
    ("plain.json.gz", b"no gzip", "is not a readable gz file"),
    ("broken.parquet", b"PAR1....", "is not a readable parquet file"),
    ("list.jsonl", b'{"text": ["a"]}\n', "is a list in row 1; give a string"),
    ("empty.parquet", b"", "is not a readable parquet file"),
    ("table.csv", b"x", "is no .txt, .jsonl, .json, .ndjson, .parquet or .arrow file"),
    ("cut.jsonl.zst", b"\x28\xb5\x2f\xfd", "is not a readable zst file"),
    ("plain.txt.bz2", b"no bz2", "is not a readable bz2 file"),
    ("plain.jsonl.xz", b"no xz", "is not a readable xz file"),
    ("text.txt.zip", b"PK", "convert or rename it"),
    ("wide.jsonl", '{"text": "a"}'.encode("utf-16"), "is not UTF-8 text (byte 0)"),
    ("short.txt", b"only a few words", "enough for"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), TEXTS)
@pytest.mark.parametrize("command", ["learn", "eval"])
def test_a_bad_text(name, content, sentence, command, checkpoint, mask, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    flags = flags_for(command, checkpoint, tmp_path / name, tmp_path / "out", mask)
    if name == "short.txt" and command == "eval":
        flags, sentence = [*flags, "--ctx_len", "128"], "too few for one window"
    assert console([command, *flags]) == 2
    assert_one_sentence(capsys, sentence)
    assert not results_in(tmp_path / "out")


def test_a_line_of_megabytes_is_a_text_like_any_other(checkpoint, mask, tmp_path, capsys):
    (tmp_path / "line.txt").write_text(TEXT.replace("\n", " ") * 4000)
    flags = flags_for("eval", checkpoint, tmp_path / "line.txt", tmp_path, mask)
    assert console(["eval", *flags, "--max_windows", "2"]) == 0


# Damaged masks: each returns (tensors, metadata) of a file, from those of a good one.


def good_mask(mask):
    from safetensors import safe_open

    with safe_open(mask / "mask.safetensors", framework="numpy") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, json.loads(file.metadata()["proxsparse"])


def three_in_a_block(tensors, metadata):
    tensors[UP][0, 0] |= 0b0111


def other_pattern(tensors, metadata):
    metadata["pattern"] = "1:4"


def impossible_pattern(tensors, metadata):
    metadata["pattern"] = "4:2"


def renamed(tensors, metadata):
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop(UP)
    metadata["shapes"]["model.layers.9.mlp.up_proj.weight"] = metadata["shapes"].pop(UP)


def lost_weight(tensors, metadata):
    tensors.pop(UP)


def reshaped(tensors, metadata):
    metadata["shapes"][UP] = [64, 24]


def negative_shape(tensors, metadata):
    metadata["shapes"][UP] = [-64, 32]


def text_shape(tensors, metadata):
    metadata["shapes"][UP] = "big"


def wrong_dtype(tensors, metadata):
    tensors[UP] = tensors[UP].astype(np.float32)


def other_format(tensors, metadata):
    metadata["format"] = "someone-elses"


def no_shapes(tensors, metadata):
    metadata.pop("shapes")


UP = "model.layers.0.mlp.up_proj.weight"
MASKS = [
    (three_in_a_block, 1, "is not 2:4: 1 blocks differ, the first is block 0"),
    (other_pattern, 1, "is not 1:4"),
    (impossible_pattern, 2, "The pattern must be N:M with N < M"),
    (renamed, 2, "the first is model.layers.9.mlp.up_proj.weight"),
    (lost_weight, 1, "its tensors and its list of shapes differ"),
    (reshaped, 1, "is not packed as its shape"),
    (negative_shape, 1, "is not packed as its shape"),
    (text_shape, 1, "is not packed as its shape"),
    (wrong_dtype, 1, "is not packed as its shape"),
    (other_format, 2, "not a mask written by proxsparse"),
    (no_shapes, 1, "is damaged"),
]


@pytest.mark.parametrize("command", ["apply", "export"])
@pytest.mark.parametrize(("damage", "code", "sentence"), MASKS)
def test_a_damaged_mask(damage, code, sentence, command, checkpoint, corpus, mask, tmp_path, capsys):
    tensors, metadata = good_mask(mask)
    damage(tensors, metadata)
    save_numpy(tensors, tmp_path / "mask.safetensors", metadata={"proxsparse": json.dumps(metadata)})
    assert metadata.get("format") == FORMAT or damage is other_format
    out = tmp_path / "out"
    assert console([command, *flags_for(command, checkpoint, corpus, out, tmp_path)]) == code
    assert_one_sentence(capsys, sentence)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 8, b"\x10" + b"\x00" * 7 + b"{" * 16])
def test_a_file_that_is_no_safetensors(content, checkpoint, corpus, tmp_path, capsys):
    (tmp_path / "mask.safetensors").write_bytes(content)
    assert console(["apply", *flags_for("apply", checkpoint, corpus, tmp_path / "out", tmp_path)]) == 1
    assert_one_sentence(capsys, "is damaged")


# Places that can't be written to.


@pytest.mark.parametrize("command", ["learn", "prune", "apply", "export", "eval"])
def test_a_file_where_a_folder_should_be(command, checkpoint, corpus, mask, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert console([command, *flags_for(command, checkpoint, corpus, tmp_path / "file", mask)]) in (1, 2)
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 1
    assert (tmp_path / "file").read_text() == "precious"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("command", ["learn", "apply", "export"])
def test_a_full_disk_leaves_nothing_half_written(command, corpus, tokenizer, small_disk, tmp_path, capsys):
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, masks = str(tmp_path / "model"), tmp_path / "mask"
    assert console(["prune", "--model", model, "--prune_method", "magnitude", "--save", str(masks)]) == 0
    flags = flags_for(command, model, corpus, small_disk, masks)
    assert console([command, *flags, *(["--save_steps", "2"] if command == "learn" else [])]) == 1
    assert_one_sentence(capsys, "The disk is full")
    assert not [p for p in results_in(small_disk) if p.name != "run.json"]


# Pickle: a file that would run code when loaded.


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "optimizer.pt"])
def test_a_pickle_never_runs(name, checkpoint, corpus, mask, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(Evil(str(tmp_path / "ran")), tmp_path / "model" / name)
    for command in ("eval", "learn", "export"):
        assert console([command, *flags_for(command, tmp_path / "model", corpus, tmp_path / "out", mask)]) == 1
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_one_sentence(tmp_path, corpus, capsys):
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    common = ["--model", str(tmp_path / "model"), "--dataset", corpus, "--ctx_len", "32"]
    pruning = ["--prune_method", "wanda", "--nsamples", "2", "--save", str(tmp_path / "mask")]
    learning = ["--samples", "2", "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    for command, more in (("eval", []), ("prune", pruning), ("learn", learning)):
        assert console([command, *common, *more]) == 2
        assert "and the model has embeddings for 64 tokens" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_empty_names_are_not_the_working_folder(checkpoint, capsys):
    assert console(["eval", "--model", ""]) == 2
    assert "name of the model is empty" in capsys.readouterr().err
    assert console(["eval", "--model", checkpoint, "--dataset", "", "--ctx_len", "32"]) == 2
    assert "--dataset must be one of" in capsys.readouterr().err
