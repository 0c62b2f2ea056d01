"""No run loses work: kills at any moment, damaged checkpoints, rotation."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from proxsparse import resume
from proxsparse.__main__ import main as console
from proxsparse.errors import RunError, UsageError
from proxsparse.record import atomic_path
from proxsparse.resume import (
    RUN_FILE,
    CompleteCheckpoints,
    alone_in,
    checkpoints,
    claim,
    fault,
    last_complete_checkpoint,
    starting_point,
)

ROOT = Path(__file__).resolve().parent.parent
KILLS = 8
# Imports once, then forks a process for every attempt at the run: what takes seconds is not what is tested.
ATTEMPTS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from proxsparse.commands import learn
import proxsparse.learning.trainer, proxsparse.operator.kernels.cpu

whole, broken, flags = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]

def start(folder):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(learn.main([*flags, "--output_dir", str(folder)]))
    return child

def newest(folder):
    return max((int(c.name.removeprefix("checkpoint-")) for c in folder.glob("checkpoint-*")), default=0)

for folder in (whole.with_name("first"), whole):  # the first may compile kernels
    began = time.monotonic()
    assert os.waitpid(start(folder), 0)[1] == 0
    length = time.monotonic() - began
rng, kills, writing, resumed = random.Random(0), 0, 0, 0
while kills < KILLS:
    late = kills % 2  # soon after it has written a checkpoint, whenever that is; else at any moment
    pause = rng.uniform(0.0, 0.2) * length if late else rng.uniform(0.05, 0.8) * length
    first, began, child, ended = newest(broken), time.monotonic(), start(broken), 0
    while not ended and time.monotonic() - began < pause:
        if late and newest(broken) == first:
            began = time.monotonic()
        time.sleep(0.01)
        ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        assert status == 0
        assert (broken / "mask.safetensors").read_bytes() == (whole / "mask.safetensors").read_bytes()
        shutil.rmtree(broken)  # it was faster; this moment does not count
        continue
    before = list(broken.glob("checkpoint-*"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    mask = broken / "mask.safetensors"  # whole or absent
    assert not mask.exists() or mask.read_bytes() == (whole / "mask.safetensors").read_bytes()
    partial = [c for c in broken.glob("checkpoint-*") if not (c / "complete.json").is_file()]
    writing, resumed = writing + bool(partial), resumed + bool(before)
assert os.waitpid(start(broken), 0)[1] == 0
print("RESULT", kills, writing, resumed)
""".replace("KILLS", str(KILLS))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_mask(checkpoint, corpus, tmp_path):
    flags = {"model": checkpoint, "dataset": corpus, "ctx_len": 32, "samples": 30, "save_steps": 2, "bf16": "false"}
    flags |= {"logging_steps": 5, "use_cpu": "true", "save_total_limit": 2, "lambda_value": "auto"}
    words = [w for name, value in flags.items() for w in (f"--{name}", str(value))]
    command = [sys.executable, "-c", ATTEMPTS, str(tmp_path / "whole"), str(tmp_path / "broken"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, _, resumed = map(int, done.stdout.split("RESULT")[-1].split())
    assert kills == KILLS
    assert resumed > 0  # some kills came after the first checkpoint
    whole, broken = ((tmp_path / name / "mask.safetensors").read_bytes() for name in ("whole", "broken"))
    assert broken == whole


@pytest.fixture
def run(tmp_path):
    """A run with three complete checkpoints of two files."""
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(os.urandom(100))
        (folder / "trainer_state.json").write_text("{}")
        mark(tmp_path, step)
    return tmp_path


def mark(folder, step, keep=None, best=None):
    from types import SimpleNamespace

    state = SimpleNamespace(is_world_process_zero=True, global_step=step, best_model_checkpoint=best)
    CompleteCheckpoints(keep).on_save(SimpleNamespace(output_dir=str(folder)), state, None)


def test_the_newest_complete_checkpoint_counts(run):
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")
    (run / "checkpoint-8").mkdir()
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50), "model.safetensors has 50 bytes, not 100"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors has changed since"),
        (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda f: (f / "complete.json").unlink(), "was not written to its end"),
        (lambda f: (f / "complete.json").write_text("{"), "its complete.json is damaged"),
        (lambda f: (f / "complete.json").write_text('{"files": {}}'), "names no file"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(damage, sentence, run, caplog):
    damage(run / "checkpoint-6")
    assert sentence in fault(run / "checkpoint-6")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    assert "checkpoint-6 is not used" in caplog.text
    assert sentence in caplog.text
    assert (run / "checkpoint-6").exists()  # nothing is deleted: it may be another program's


def test_old_checkpoints_go_only_after_the_new_one_is_complete(run):
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-10")
    (run / "checkpoint-10" / "complete.json").unlink()
    assert len(checkpoints(run)) == 4  # the new one is not complete yet
    mark(run, 10, keep=2)
    assert [p.name for p in checkpoints(run)] == ["checkpoint-6", "checkpoint-10"]
    assert set(json.loads((run / "checkpoint-10" / "complete.json").read_text())["files"]) == {
        "model.safetensors",
        "trainer_state.json",
    }


def test_a_checkpoint_of_the_model_alone_is_read_and_not_gone_on_from(run, caplog):
    marker = json.loads((run / "checkpoint-6" / "complete.json").read_text())
    (run / "checkpoint-6" / "complete.json").write_text(json.dumps(marker | {"save_only_model": True}))
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")
    assert starting_point(run) == str(run / "checkpoint-4")
    assert "checkpoint-6 is not used: it holds the model without the optimizer's state" in caplog.text
    with pytest.raises(UsageError, match="can't be obeyed: it holds the model without the optimizer's state"):
        starting_point(run, str(run / "checkpoint-6"))


def test_the_best_checkpoint_outlives_the_rotation(run):
    mark(run, 6, keep=1, best=run / "checkpoint-2")
    assert [p.name for p in checkpoints(run)] == ["checkpoint-2", "checkpoint-6"]


def test_the_checkpoint_just_written_and_copies_of_the_user_stay(run):
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-2-backup")
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-3")
    mark(run, 3, keep=1)  # of a run that went on from checkpoint-2
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2-backup", "checkpoint-3"]


def test_checkpoints_that_are_not_whole_do_not_count_as_kept(run):
    for step in (3, 5):
        (run / f"checkpoint-{step}").mkdir()
    mark(run, 6, keep=2)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]


def test_a_folder_belongs_to_the_run_that_claimed_it(tmp_path):
    record = {"settings": {"samples": 4, "dataset": "d" * 150, "logging_steps": 1}, "commit": "abc"}
    claim(tmp_path / "run", record, write=False)
    assert not (tmp_path / "run").exists()
    claim(tmp_path / "run", record)
    written = (tmp_path / "run" / RUN_FILE).read_bytes()
    claim(tmp_path / "run", record | {"commit": "def"})  # only settings decide
    other = record["settings"] | {"logging_steps": 2}
    claim(tmp_path / "run", {"settings": other}, decisive=["samples", "a later setting"])
    with pytest.raises(UsageError, match=r"holds a run with `logging_steps=1`, now it is 2: give another `output_dir`"):
        claim(tmp_path / "run", {"settings": other})
    with pytest.raises(UsageError, match=r"holds a run with another `dataset`: give another"):
        claim(tmp_path / "run", {"settings": record["settings"] | {"dataset": "e" * 150}})
    assert (tmp_path / "run" / RUN_FILE).read_bytes() == written
    (tmp_path / "run" / RUN_FILE).write_text("[]")
    with pytest.raises(RunError, match=r"run.json is damaged"):
        claim(tmp_path / "run", record)


def test_the_checkpoint_that_is_asked_for_is_taken_or_refused(run, tmp_path):
    assert starting_point(run) == starting_point(run, "true") == str(run / "checkpoint-6")
    assert starting_point(run, str(run / "checkpoint-2")) == str(run / "checkpoint-2")
    (run / "checkpoint-2" / "complete.json").unlink()
    refused = {run / "checkpoint-2": "it was not written to its end", run / "none": "there is no such folder"}
    for asked, why in refused.items():
        with pytest.raises(UsageError, match=f"`resume_from_checkpoint=.*` can't be obeyed: {why}"):
            starting_point(run, str(asked))


def test_a_second_process_does_not_learn_in_the_same_folder(checkpoint, corpus, tmp_path, capsys):
    flags = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", "32", "--samples", "2", "--bf16", "false"]
    learn = ["learn", *flags, "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    with alone_in(tmp_path / "run"):  # a lock is of an open file, so this process can have both
        assert console(learn) == 1
        said = capsys.readouterr().err
        assert (
            f"Another process is learning in {tmp_path / 'run'}: wait until it is done, or give another --out" in said
        )
        assert not (tmp_path / "run" / "mask.safetensors").exists()
    assert console(learn) == 0


def test_the_folder_of_a_run_is_no_checkpoint_to_resume_from(run):
    with pytest.raises(UsageError, match=r"it is the folder of a run, whose last checkpoint is .*checkpoint-"):
        starting_point(run / "new", str(run))


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_reads_the_checkpoints_and_all_take_its_word(rank, run, monkeypatch):
    read, sent = [], {"answer": [str(run / "checkpoint-6"), None]}
    real = resume._sha256
    monkeypatch.setattr(resume, "_sha256", lambda path: read.append(path) or real(path))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)

    def broadcast(objects):
        if rank:
            objects[:] = sent["answer"]
        sent["answer"] = list(objects)

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    assert starting_point(run) == str(run / "checkpoint-6")
    assert sent["answer"] == [str(run / "checkpoint-6"), None]
    assert bool(read) == (rank == 0)
    if rank:
        sent["answer"] = [None, UsageError("refused")]
    with pytest.raises(UsageError, match="refused" if rank else "there is no such folder"):
        starting_point(run, str(run / "none"))
    assert sent["answer"][0] is None


def test_checksums_of_several_files_are_made_at_the_same_time(run, monkeypatch):
    both, real = threading.Barrier(2, timeout=20), resume._sha256

    def wait_for_the_other(path):
        both.wait()
        return real(path)

    monkeypatch.setattr(resume, "_sha256", wait_for_the_other)
    assert fault(run / "checkpoint-6") is None


def test_what_a_killed_process_left_behind_goes_when_the_same_is_written_again(tmp_path):
    program = "import os, signal, sys, proxsparse.record as r\nwith r.atomic_path(sys.argv[1]) as scratch:\n"
    program += "    scratch.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    for name in ("x", "y"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)])
    left = sorted(path.name[:3] for path in tmp_path.iterdir())
    assert left == [".x.", ".y."]
    for held in tmp_path.glob(".*/.held"):
        os.utime(held, (0, 0))
    (kept,) = tmp_path.glob(".x.*")
    (kept / "replaced").mkdir()  # killed while it put the new one in the old one's place
    with atomic_path(tmp_path / "x") as scratch:
        scratch.write_text("new")
    assert kept.is_dir()
    with atomic_path(tmp_path / "y") as other:
        os.utime(other.parent / ".held", (0, 0))
        with atomic_path(tmp_path / "y") as scratch:  # another writer: what it has under way stays
            scratch.write_text("whole")
        assert other.parent.is_dir()
        other.write_text("whole too")
    assert sorted(path.name[:3] for path in tmp_path.iterdir()) == [".x.", "x", "y"]
    assert (tmp_path / "y").read_text() == "whole too"
