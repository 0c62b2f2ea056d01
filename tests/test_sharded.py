"""FSDP2 in processes on the CPU (gloo): the mask is that of one process."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import DistributedType
from conftest import tiny_llama
from test_prunable import build

from proxsparse.commands.extract import main as extract
from proxsparse.commands.learn import main as learn
from proxsparse.mask import load_mask

ROOT = Path(__file__).resolve().parent.parent
# Gradients that were summed in another order can turn a tie: at most one entry in ten thousand. bfloat16 rounds every
# partial sum, and where weights are bfloat16 the rounding noise is the shard's own.
EXACT, SUMMED, ROUNDED = 0.0, 1e-4, 0.03
CASES = {
    "masked": ({}, SUMMED),
    "auto": ({"lambda_value": "auto"}, SUMMED),
    "accumulation": ({"gradient_accumulation_steps": 2}, SUMMED),
    "paper with lambda2": (
        {
            "method": "paper", "lambda_value": 0.1, "learning_rate": 1e-3, "project_lambda2": 1, "lambda2_value": 0.25
        }, SUMMED
    ),
    "checkpointing": ({"activation_checkpointing": "true"}, SUMMED),
    # Steps so large that a run which learned nothing would be far off.
    "mixed bfloat16": ({"bf16": "true", "learning_rate": 0.02}, ROUNDED),
    "bfloat16": ({"dtype": "bfloat16", "bf16": "true", "learning_rate": 0.02}, ROUNDED),
    "bfloat16 AdamW": ({"dtype": "bfloat16", "optim": "adamw_torch", "learning_rate": 0.02}, ROUNDED),
}  # fmt: skip
REFUSED = {
    "base in the checkpoint": ({"keep_base": "checkpoint"}, "--keep_base checkpoint reads whole weights"),
    "step in backward": ({"optim_in_backward": "true"}, "--optim_in_backward steps before gradients"),
    "inputs first": ({}, "is sharded along its inputs"),
}
pytestmark = pytest.mark.slow  # each starts several processes


def settings(**changes):
    """Environment that accelerate launch makes of its configuration file."""
    config = yaml.safe_load((ROOT / "script" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"] | changes
    environment = {name.upper(): str(value).lower() for name, value in config.items()}
    environment |= {n: str(config[n.lower()]) for n in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE")}
    return environment | {"ACCELERATE_USE_FSDP": "true"}


def flags(model, corpus, folder, **changes):
    given = {"model": model, "dataset": corpus, "ctx_len": 32, "samples": 12, "use_cpu": "true", "bf16": "false"}
    given |= {"save_strategy": "no", "logging_steps": 2, "output_dir": folder} | changes
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def sharded(torchrun):
    """Function that gives the exit codes and the output of runs in as many processes, one run after the other."""

    def run(processes, runs, fsdp=True, **changes):
        environment = settings(**changes) if fsdp else {}
        done = torchrun(processes, "sharded_worker.py", json.dumps(runs), **environment)
        assert done.returncode == 0, done.stderr[-4000:]
        # Processes share the output: what one says may stand in the middle of another's line.
        return [int(code) for code in re.findall(r"EXIT (\d+)\n", done.stdout)], done

    return run


def difference(whole, parts):
    """Share of mask entries that differ."""
    whole, parts = load_mask(whole).tensors, load_mask(parts).tensors
    assert list(whole) == list(parts)
    return sum(int((whole[n] != parts[n]).sum()) for n in whole) / sum(m.numel() for m in whole.values())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    build("gpt2", vocab_size=257).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two(checkpoint, gpt2, corpus, tmp_path_factory, sharded):
    """All cases in two processes: (folder, exit codes, standard error)."""
    folder = tmp_path_factory.mktemp("two")
    models = {"inputs first": gpt2}
    changes = {name: case[0] for name, case in (CASES | REFUSED).items()}
    runs = [flags(models.get(n, checkpoint), corpus, folder / n, **c) for n, c in changes.items()]
    codes, done = sharded(2, runs)
    return folder, dict(zip(changes, codes, strict=True)), done.stderr


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_the_mask_of_one(case, two, checkpoint, corpus, tmp_path):
    folder, codes, _ = two
    changes, tolerance = CASES[case]
    assert codes[case] == 0
    assert learn(flags(checkpoint, corpus, tmp_path / "whole", batch_size=2, **changes)) == 0  # as many a step
    whole, start = tmp_path / "whole", tmp_path / "start"
    assert difference(whole, folder / case) <= tolerance
    assert learn(flags(checkpoint, corpus, start, **changes | {"learning_rate": 1e-9, "lambda_value": 0})) == 0
    assert difference(whole, start) > 2 * tolerance  # or the run might have learned nothing


@pytest.mark.parametrize("case", REFUSED)
def test_what_shards_do_not_allow_is_refused_in_a_sentence(case, two):
    folder, codes, stderr = two
    assert codes[case] == 2
    assert REFUSED[case][1] in stderr
    assert not (folder / case / "mask.safetensors").exists()


def test_uneven_shards_that_stay_gathered_and_experts_learn_the_mask_of_one(tokenizer, corpus, tmp_path, sharded):
    # Three processes share 28 rows unevenly, and two experts so that one process has none.
    models = {
        "uneven": tiny_llama(
            hidden_size=28, intermediate_size=44, num_attention_heads=1, num_key_value_heads=1, head_dim=28
        ),
        "experts": build("mixtral", vocab_size=257, initializer_range=0.2, num_local_experts=2),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        assert learn(flags(tmp_path / name, corpus, tmp_path / f"{name} whole", batch_size=3)) == 0
    runs = [flags(str(tmp_path / name), corpus, str(tmp_path / f"{name} parts")) for name in models]
    codes, done = sharded(3, runs, fsdp_reshard_after_forward=False, fsdp_cpu_ram_efficient_loading=False)
    assert codes == [0, 0], done.stderr[-2000:]
    for name in models:
        assert difference(tmp_path / f"{name} whole", tmp_path / f"{name} parts") <= SUMMED


@pytest.mark.parametrize("file", sorted((ROOT / "script" / "accelerate").glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_takes_the_configuration_files(file):
    found = load_config_from_file(str(file))
    assert found.distributed_type == DistributedType.FSDP
    assert found.fsdp_config["fsdp_version"] == 2
    assert found.fsdp_config["fsdp_offload_params"] == ("offload" in file.name)


def test_replicas_of_bfloat16_weights_stay_alike(checkpoint, corpus, tmp_path, sharded):
    codes, done = sharded(2, [flags(checkpoint, corpus, str(tmp_path), dtype="bfloat16")], fsdp=False)
    assert codes == [0]
    digests = dict(re.findall(r"WEIGHTS (\d) (\w{64})\n", done.stdout))
    assert set(digests) == {"0", "1"}
    assert digests["0"] == digests["1"]


def test_one_process_learns_the_same_bits(checkpoint, corpus, tmp_path, sharded):
    assert learn(flags(checkpoint, corpus, tmp_path / "whole")) == 0
    codes, _ = sharded(1, [flags(checkpoint, corpus, str(tmp_path / "parts"))])
    assert codes == [0]
    assert difference(tmp_path / "whole", tmp_path / "parts") == EXACT


def test_a_sharded_run_goes_on_from_its_checkpoint_and_gives_its_mask(checkpoint, corpus, tmp_path, sharded):
    run, extracted = tmp_path / "run", tmp_path / "extracted.safetensors"
    changes = {"save_strategy": "steps", "save_steps": 2, "lambda_value": "auto"}
    assert sharded(2, [flags(checkpoint, corpus, str(run), **changes)])[0] == [0]
    whole = load_mask(run).tensors
    assert (run / "checkpoint-6" / "pytorch_model_fsdp_0").is_dir()  # shards, not the whole model in one process
    assert extract(["--checkpoint", str(run), "--output", str(extracted)]) == 0
    assert all(load_mask(extracted).tensors[name].equal(mask) for name, mask in whole.items())
    again = ["--checkpoint", str(run / "checkpoint-6"), "--output", str(extracted)]
    assert extract(again) == 0
    assert extract([*again, "--include", "q_proj"]) == 2  # it would be the whole mask
    (run / "mask.safetensors").unlink()
    shutil.rmtree(run / "checkpoint-6")
    codes, done = sharded(2, [flags(checkpoint, corpus, str(run), **changes)])
    assert codes == [0]
    assert (done.stdout + done.stderr).count("going on from") == 1
    assert all(load_mask(run).tensors[name].equal(mask) for name, mask in whole.items())
