"""The commands, as a user runs them: end to end on a tiny model, and one clear sentence for every mistake."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxsparse.mask import load_mask

ROOT = Path(__file__).resolve().parent.parent


def started(python, script, *args):
    """Run a script of the repository as a program of its own; returns the finished process."""
    command = [python, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)


def run(script, *args):
    """Run a script of the repository as ``started`` does, but in this process, which has imported all it needs."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", [script, *map(str, args)])
        patch.chdir(ROOT)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=error.getvalue())


def last_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def learn_flags(checkpoint, corpus, out, **changes):
    flags = {"model": checkpoint, "dataset": corpus, "ctx_len": 32, "samples": 24, "output_dir": out, "save_steps": 6}
    flags |= {"bf16": "false", "logging_steps": 4} | changes
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory, checkpoint, corpus):
    """A finished run of end-to-end/main.py."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, last_json(run("end-to-end/main.py", *learn_flags(checkpoint, corpus, out)))


def test_learning_leaves_a_mask_a_history_and_its_configuration(learned, checkpoint):
    out, printed = learned
    mask = load_mask(printed["mask"])
    assert mask.base_model == checkpoint
    assert mask.density() == 0.5
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["samples"] == 24
    assert record["settings"]["seed"] == 42
    assert record["versions"]["torch"] == torch.__version__
    assert any("share_24" in entry for entry in json.loads((out / "history.json").read_text()))


def test_extraction_from_the_checkpoint_gives_the_same_mask(learned, tmp_path):
    out, printed = learned
    done = run("end-to-end/mask_op.py", "--checkpoint", out, "--output", tmp_path / "again.safetensors")
    assert "zeros in the blocks" in done.stdout
    again, first = load_mask(last_json(done)["mask"]), load_mask(printed["mask"])
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)


def test_the_pruned_checkpoint_is_the_original_under_the_mask_and_evaluates_the_same(
    learned, checkpoint, corpus, tmp_path
):
    out, printed = learned
    evaluation = ["--dataset", corpus, "--ctx_len", "32", "--split", "heldout"]
    masked = run(
        "eval/eval_mask_ppl.py", "--model", checkpoint, "--mask", out, *evaluation, "--save", tmp_path / "pruned"
    )
    plain = run("eval/ppl.py", "--model", tmp_path / "pruned", *evaluation, "--output", tmp_path / "ppl.json")
    assert last_json(masked)[corpus] == last_json(plain)[corpus]
    assert "2:4 blocks: 100.00%" in plain.stdout
    record = json.loads((tmp_path / "ppl.json").read_text())
    assert record["perplexity"][corpus]["windows"] > 0
    assert record["blocks_24"]["all"] == 1.0
    before, after = (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"),
    )
    mask = load_mask(printed["mask"])
    for name, weight in after.named_parameters():
        expected = before.get_parameter(name)
        kept = mask.tensors.get(name)
        assert torch.equal(weight, expected if kept is None else torch.where(kept, expected, 0.0)), name
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    AutoTokenizer.from_pretrained(tmp_path / "pruned")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm", "maskllm", "roi"])
def test_baselines_write_the_same_kind_of_mask(method, checkpoint, corpus, tmp_path):
    flags = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", "32", "--nsamples", "8", "--save", tmp_path]
    printed = last_json(run("baseline/main.py", "--prune_method", method, "--mask_only", *flags))
    assert printed["kept"] == 0.5
    assert load_mask(tmp_path).info["method"] == method


def test_a_baseline_that_changes_weights_writes_a_checkpoint(checkpoint, corpus, tmp_path):
    flags = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", "32", "--nsamples", "8"]
    last_json(run("baseline/main.py", "--prune_method", "sparsegpt", *flags, "--save_model", tmp_path / "m"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m").model.layers[0].mlp.up_proj.weight
    assert (found.view(-1, 4).count_nonzero(-1) <= 2).all()


def test_the_report_tabulates_and_draws(learned, checkpoint, corpus, tmp_path):
    out, _ = learned
    last_json(
        run("eval/ppl.py", "--model", checkpoint, "--dataset", corpus, "--ctx_len", 32, "--output", tmp_path / "d.json")
    )
    done = run("eval/report.py", "--run", out, "--rows", f"dense={tmp_path / 'd.json'}")
    assert last_json(done)["dense"][corpus] > 1
    assert (out / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_report_is_one_page_that_needs_nothing_else(learned, checkpoint, corpus, tmp_path):
    out, _ = learned
    flags = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", 32, "--output", tmp_path / "d.json"]
    last_json(run("eval/ppl.py", *flags))
    last_json(run("end-to-end/mask_op.py", "--checkpoint", out, "--record", out / "blocks.json"))
    run("baseline/main.py", "--model", checkpoint, "--prune_method", "magnitude", "--save", tmp_path / "magnitude")
    rows = ["--rows", f"dense <&> model={tmp_path / 'd.json'}"]
    last_json(run("eval/report.py", "--run", out, *rows, "--compare", f"magnitude={tmp_path / 'magnitude'}"))
    page = (out / "report.html").read_text()
    assert "dense &lt;&amp;&gt; model" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=.(https?:|//|[^d])", page)
    assert "masked" in page
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("the page is not opened: Chromium is not installed")
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1100,1500"]
    command = [chromium, *flags, f"--screenshot={shot}", (out / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.stat().st_size > 20_000
    assert "CONSOLE" not in done.stderr


def test_masks_agree_with_themselves_and_by_half_with_chance():
    from proxsparse.evaluation.report import agreement_by_kind
    from proxsparse.mask import Mask
    from proxsparse.operator.prox import top2_mask

    torch.manual_seed(0)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "h.0.attn.c_attn.weight"]
    ours, other = (Mask({name: top2_mask(torch.randn(64, 64)) for name in names}) for _ in range(2))
    assert agreement_by_kind(ours, ours) == {"all": 1.0, "attn.c_attn": 1.0, "mlp.up_proj": 1.0}
    assert agreement_by_kind(ours, other)["all"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow  # a process of its own
def test_the_operator_as_a_program(tmp_path):
    printed = last_json(started(sys.executable, "end-to-end/prox_op.py", 4, 3, 2, 1, "--draw", tmp_path / "path.png"))
    assert printed["prox"] == [4.0, 3.0, 0.0, 0.0]
    assert (tmp_path / "path.png").stat().st_size > 1000
    beside = "from prox_op import prox_op; import torch; print(prox_op(torch.ones(1, 4), 9.0).tolist())"
    done = subprocess.run([sys.executable, "-c", beside], capture_output=True, text=True, cwd=ROOT / "end-to-end")
    assert done.stdout.strip() == "[[1.0, 1.0, 0.0, 0.0]]"


def test_the_loop_in_the_documentation_runs_and_prunes():
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "end-to-end/doc.md").read_text(), re.DOTALL)
    space: dict = {}
    torch.manual_seed(0)
    exec(code, space)
    for name, mask in space["masks"].items():
        assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all(), name
    weights = [m.weight for m in space["model"] if isinstance(m, torch.nn.Linear)]
    assert all((w.view(-1, 4).count_nonzero(-1) <= 2).float().mean() > 0.9 for w in weights)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_mask_of_an_unbroken_one(checkpoint, corpus, tmp_path, python):
    whole = tmp_path / "whole"
    flags = {"samples": 60, "save_steps": 5}
    last_json(started(python, "end-to-end/main.py", *learn_flags(checkpoint, corpus, whole, **flags)))
    broken = tmp_path / "broken"
    # A process that is killed itself, not one that another ends for it.
    command = [sys.executable, "end-to-end/main.py", *map(str, learn_flags(checkpoint, corpus, broken, **flags))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(broken.glob("checkpoint-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "mask.safetensors").exists()
    again = started(python, "end-to-end/main.py", *learn_flags(checkpoint, corpus, broken, **flags))
    last_json(again)
    assert load_file(broken / "mask.safetensors").keys() == load_file(whole / "mask.safetensors").keys()
    assert (broken / "mask.safetensors").read_bytes() == (whole / "mask.safetensors").read_bytes()


def test_a_folder_that_holds_another_run_is_refused(learned, checkpoint, corpus):
    out, _ = learned
    done = run("end-to-end/main.py", *learn_flags(checkpoint, corpus, out, lambda_value=0.7))
    assert done.returncode == 2
    assert "holds a run with --lambda_value 0.002, now it is 0.7: give another --output_dir" in done.stderr


MISTAKES = [
    ("end-to-end/main.py", ["--model", "/none"], 2, "--model: there is no folder /none"),
    ("end-to-end/main.py", ["--samples", "0"], 2, "--samples must be at least 1; got 0"),
    ("end-to-end/main.py", ["--ctx_len", "4096"], 2, "--ctx_len must be between 8 and 128"),
    ("end-to-end/main.py", ["--samples", "100000"], 2, "but --samples is 100000"),
    ("end-to-end/main.py", ["--lambda_valeu", "1"], 2, "There is no flag --lambda_valeu; did you mean --lambda_value?"),
    (
        "eval/ppl.py",
        ["--model", "tests/nowhere"],
        2,
        "--model: there is no folder tests/nowhere; for a Hub id of that name",
    ),
    ("end-to-end/main.py", ["--lambda_value", "-1"], 2, "--lambda_value must be a finite number"),
    (
        "end-to-end/main.py",
        ["--lambda_value", "big"],
        2,
        "--lambda_value must be a finite number of at least 0, or auto; got big",
    ),
    ("end-to-end/main.py", ["--nonsense", "1"], 2, "--nonsense"),
    ("end-to-end/main.py", ["--method", "magic"], 2, "--method must be one of"),
    ("end-to-end/main.py", ["--dataset", "/none.txt"], 2, "--dataset must be one of"),
    ("end-to-end/main.py", ["--dataset", "wikitext2"], 1, "can't be loaded from the Hub"),
    ("end-to-end/main.py", ["--device", "tpu9"], 2, "--device must be auto, cpu"),
    ("end-to-end/main.py", ["--dtype", "int3"], 2, "--dtype must be one of"),
    ("end-to-end/mask_op.py", ["--checkpoint", "/none"], 2, "--checkpoint: there is no folder /none"),
    ("end-to-end/mask_op.py", [], 2, "the following arguments are required: --checkpoint"),
    ("end-to-end/prox_op.py", ["1", "2"], 2, "A block is four finite numbers; got 2"),
    ("end-to-end/prox_op.py", ["1", "2", "3", "nan"], 2, "four finite numbers"),
    ("end-to-end/prox_op.py", [], 2, "Give the four weights of a block"),
    ("eval/ppl.py", ["--ctx_len", "0"], 2, "must be an integer of at least 1, got '0'"),
    ("eval/ppl.py", ["--ctx_len", "999"], 2, "--ctx_len must be between 8 and 128"),
    ("eval/ppl.py", ["--dtype", "x"], 2, "invalid choice: 'x'"),
    ("eval/eval_mask_ppl.py", ["--mask", "/none"], 2, "--mask: there is no file /none"),
    ("eval/eval_mask_ppl.py", ["--mask", "README.md", "--no_eval"], 2, "leaves nothing to do"),
    ("eval/eval_mask_ppl.py", ["--mask", "README.md"], 1, "is damaged"),
    ("eval/report.py", ["--run", "/none"], 2, "--run: there is no folder /none"),
    ("baseline/main.py", ["--prune_method", "magnitude"], 2, "Give --save FOLDER"),
    ("baseline/main.py", ["--prune_method", "sparsegpt", "--save", "x"], 2, "give --save_model or --mask_only"),
    ("baseline/main.py", ["--prune_method", "wanda", "--sparsity_type", "4:2", "--save", "x"], 2, "must be N:M"),
    ("baseline/main.py", ["--prune_method", "wanda", "--allocation", "owl", "--save", "x"], 2, "2:4 fixes the share"),
    ("baseline/main.py", ["--prune_method", "maskllm", "--sparsity_type", "4:8", "--save", "x"], 2, "2:4 masks only"),
    (
        "baseline/main.py",
        ["--prune_method", "roi", "--sparsity_type", "unstructured", "--save", "x"],
        2,
        "N:M masks only",
    ),
    ("baseline/main.py", ["--prune_method", "wanda", "--cooling", "linear", "--save", "x"], 2, "--cooling belongs to"),
    ("eval/zero_shot.py", ["--mask", "/none"], 2, "--mask: there is no file /none"),
    ("eval/zero_shot.py", ["--limit", "0"], 2, "must be an integer of at least 1"),
]


@pytest.mark.parametrize(("script", "flags", "code", "sentence"), MISTAKES)
def test_a_mistake_gives_one_sentence_and_its_exit_code(
    script, flags, code, sentence, checkpoint, corpus, tmp_path, monkeypatch, capsys
):
    module = {
        "end-to-end/main.py": "learn",
        "end-to-end/mask_op.py": "extract",
        "end-to-end/prox_op.py": "operator",
        "eval/ppl.py": "eval",
        "eval/eval_mask_ppl.py": "apply",
        "eval/report.py": "report",
        "eval/zero_shot.py": "zero_shot",
        "baseline/main.py": "prune",
    }[script]
    defaults = {}
    if module == "zero_shot":
        defaults |= {"--model": checkpoint}
    if module in ("learn", "eval", "apply", "prune"):
        defaults |= {"--model": checkpoint, "--dataset": corpus, "--ctx_len": "32"}
    if module == "learn":
        defaults |= {"--output_dir": str(tmp_path / "out"), "--bf16": "false", "--use_cpu": "true"}
    argv = [w for name, value in defaults.items() if name not in flags for w in (name, value)] + flags
    monkeypatch.chdir(ROOT)
    main = __import__(f"proxsparse.commands.{module}", fromlist=["main"]).main
    assert main(argv) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert sentence in lines[0]
    assert "Traceback" not in error


@pytest.mark.parametrize("script", sorted({row[0] for row in MISTAKES}))
def test_help_begins_with_commands_to_copy(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"python {script}" in done.stdout


def test_a_full_disk_is_one_sentence(learned, checkpoint, monkeypatch, capsys, tmp_path):
    from proxsparse.commands import apply as mask_ppl

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "pruned"))

    monkeypatch.setattr(mask_ppl, "save_pruned", full)
    out, _ = learned
    flags = ["--model", checkpoint, "--mask", str(out), "--save", str(tmp_path / "pruned"), "--no_eval"]
    assert mask_ppl.main(flags) == 1
    assert "error: The disk is full" in capsys.readouterr().err


def test_a_mask_for_another_model_is_one_sentence(learned, capsys, tmp_path, tokenizer):
    from conftest import tiny_llama

    from proxsparse.commands import apply as mask_ppl

    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    out, _ = learned
    flags = ["--model", str(tmp_path / "other"), "--mask", str(out), "--save", str(tmp_path / "x"), "--no_eval"]
    assert mask_ppl.main(flags) == 2
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_safetensors_file_that_is_no_mask_is_one_sentence(tmp_path, checkpoint, capsys):
    from proxsparse.commands import apply as mask_ppl

    save_file({"w": torch.ones(4)}, tmp_path / "w.safetensors")
    assert mask_ppl.main(["--model", checkpoint, "--mask", str(tmp_path / "w.safetensors")]) == 2
    assert "not a mask written by proxsparse" in capsys.readouterr().err


def test_a_tokenizer_that_puts_bos_first_is_noted_and_every_window_can_have_it(checkpoint, corpus, tmp_path, capsys):
    from tokenizers.processors import TemplateProcessing

    from proxsparse.commands import eval as evaluation

    shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"bos_token": "<eos>"})
    bos = ("<eos>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[bos])
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--dataset", corpus, "--ctx_len", "32"]
    assert evaluation.main(flags) == 0
    without = capsys.readouterr().out
    assert "note: this tokenizer puts BOS first" in without
    assert evaluation.main([*flags, "--bos"]) == 0
    shown = capsys.readouterr().out
    assert "note: this tokenizer" not in shown
    assert json.loads(shown.splitlines()[-1])[corpus] != json.loads(without.splitlines()[-1])[corpus]
