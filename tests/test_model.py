"""Loading models: what works, and one sentence for each thing that does not."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import PreTrainedConfig

from proxsparse.errors import RunError, UsageError
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.loading import load_model, load_tokenizer, resolve_device, resolve_dtype


def test_a_folder_loads_with_its_dtype_and_name(checkpoint):
    model = load_model(checkpoint)
    assert model.dtype == torch.float32
    assert model.config._name_or_path == checkpoint
    assert load_model(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("/no/such/folder", UsageError, "There is no folder /no/such/folder"),
        ("./nothing", UsageError, "There is no folder ./nothing"),
        ("missing.gguf", UsageError, "There is no file missing.gguf"),
        ("nobody/nothing", RunError, "neither a local folder nor in the cache, and"),
        ("bad name!", UsageError, "neither a folder here nor a Hub id"),
        ("https://huggingface.co/some/model/tree/main", UsageError, "is an address: give the Hub id, some/model,"),
    ],
)
def test_a_missing_model_is_named(name, kind, message):
    with pytest.raises(kind, match=message):
        load_model(name)


def test_weights_under_another_name_are_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(RunError, match=r"has consolidated\.safetensors, which transformers does not open: name it"):
        load_model(str(folder))


@pytest.mark.parametrize("named", ["parts/a.safetensors", "../a.safetensors"])
def test_an_index_names_files_next_to_it(checkpoint, tmp_path, named):
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
    with pytest.raises(RunError, match="a folder below" if named[0] == "p" else "do not trust it"):
        list(Checkpoint(folder).files)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "is gated: accept its licence on https://huggingface.co/some/model, and log in"),
        (RepositoryNotFoundError, "There is no model some/model"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(monkeypatch, error, message):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access something") from error.__new__(error)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", refuse)
    with pytest.raises(RunError, match=message):
        load_model("some/model")


def test_a_folder_without_a_config_is_not_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="has no config.json, so it is not a checkpoint"):
        load_model(str(tmp_path))


def damaged(checkpoint, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    change(folder)
    return str(folder)


def test_an_unknown_architecture_is_one_sentence(checkpoint, tmp_path):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "martian"}))

    with pytest.raises(RunError, match="can't be loaded: .*martian"):
        load_model(damaged(checkpoint, tmp_path, change))


def test_truncated_weights_are_one_sentence(checkpoint, tmp_path):
    def change(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(RunError, match="model.safetensors is damaged"):
        load_model(damaged(checkpoint, tmp_path, change))


def test_pickled_weights_are_never_loaded(checkpoint, tmp_path):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save(Payload(), folder / "pytorch_model.bin")

    with pytest.raises(RunError, match="no safetensors weights, and pickle files can run code"):
        load_model(damaged(checkpoint, tmp_path, change))
    assert not ran.exists()


def test_a_missing_tokenizer_is_one_sentence(checkpoint, tmp_path):
    def change(folder):
        for file in folder.glob("tokenizer*"):
            file.unlink()

    with pytest.raises(RunError, match="can't be loaded"):
        load_tokenizer(damaged(checkpoint, tmp_path, change))


def test_dtypes_and_devices_are_checked():
    with pytest.raises(UsageError, match="`dtype` must be one of auto, float32, bfloat16, float16; got 'int8'"):
        resolve_dtype("int8")
    with pytest.raises(UsageError, match="`device` must be auto, cpu, or a device of this machine; got 'cuda:77'"):
        resolve_device("cuda:77")
    assert resolve_dtype("auto") == "auto"
    assert resolve_device("cpu") == "cpu"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1234\n"


def weights_are(folder, kind):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir() if kind == "folder" else (folder / "model.safetensors").symlink_to("/none/x")


STRANGE = {
    "a dtype with the package's name": (
        lambda f: configured(f, dtype="torch.bfloat16"),
        "has dtype 'torch.bfloat16', and it must be one of float32, bfloat16, float16: correct it",
    ),
    "a nested dtype": (lambda f: configured(f, text_config={"torch_dtype": "half"}), "has torch_dtype 'half'"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds .., and not an object"),
    "null": (lambda f: (f / "config.json").write_text("null"), "holds None, and not an object"),
    "a field of another type": (lambda f: configured(f, vocab_size="257"), "'vocab_size': .*Its config.json, or"),
    "an unknown function": (lambda f: configured(f, hidden_act="zelu"), "KeyError: 'zelu'. Its config.json, or"),
    "other shapes": (lambda f: configured(f, intermediate_size=128), "weights have other shapes than its config.json"),
    "weights that Git LFS did not fetch": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        r"model.safetensors is a pointer of Git LFS, .*git lfs pull",
    ),
    "a folder instead of weights": (lambda f: weights_are(f, "folder"), "model.safetensors is a folder: get"),
    "a link to nothing": (lambda f: weights_are(f, "link"), "is a link to a file that is not there: get the model"),
}


def configured(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_model_is_told_with_what_is_wrong_and_what_to_do(kind, checkpoint, tmp_path):
    change, message = STRANGE[kind]
    with pytest.raises(RunError, match=message) as found:
        load_model(damaged(checkpoint, tmp_path, change))
    assert "\n" not in str(found.value)


def test_a_tokenizer_that_git_lfs_did_not_fetch_is_named(checkpoint, tmp_path):
    folder = damaged(checkpoint, tmp_path, lambda folder: (folder / "tokenizer.json").write_text(POINTER))
    with pytest.raises(RunError, match=r"tokenizer.json is a pointer of Git LFS"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://some/model", "is an address: give the Hub id, some/model,"),
        ("s3://bucket/model", "is an address: give the Hub id, or a folder"),
        ("some/model@main", r"of the form organisation/name \(a revision is given with `revision`\)"),
    ],
)
def test_names_of_other_programs_are_told(name, message):
    with pytest.raises(UsageError, match=message):
        load_model(name)
