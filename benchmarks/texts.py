"""Seconds and memory that calibration samples cost, from one long text file, each in a fresh process (Linux).

    python benchmarks/texts.py --megabytes 60 1000

A tokenizer of 32,000 tokens is trained on the generated text first. Its own memory is not counted: the peak is what the
process holds above what it held once the tokenizer had been loaded and used.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import print_table, write_record

SAMPLES, CTX_LEN = 8, 128


def write_text(path: Path, megabytes: int) -> None:
    """Paragraphs of random words whose lengths and frequencies are like those of prose, the same every time."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(1, 10))) for _ in range(50_000)]
    frequencies = [1 / (rank + 10) for rank in range(len(words))]
    blocks = []
    for _ in range(40):  # 25 MB, repeated as often as it takes
        drawn = rng.choices(words, frequencies, k=100_000)
        blocks.append("".join(" ".join(drawn[start : start + 100]) + ".\n\n" for start in range(0, len(drawn), 100)))
    written = 0
    with path.open("w") as file:
        while written < megabytes * 10**6:
            written += file.write(blocks[rng.randrange(len(blocks))])


def train_tokenizer(text: Path, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with text.open() as file:
        lines = file.read(4 * 10**6).splitlines()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measure(text: str, folder: str) -> dict[str, float]:
    """In a process of its own: a peak never goes down again."""
    from transformers import AutoTokenizer

    from proxsparse.text import calibration_windows

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer("some words")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = memory("VmRSS")
    start = time.perf_counter()
    windows = calibration_windows(text, tokenizer, CTX_LEN, SAMPLES, 0)
    seconds = time.perf_counter() - start
    assert windows.shape == (SAMPLES, CTX_LEN)
    return {"seconds": seconds, "peak_mb": (memory("VmHWM") - before) / 1e6}


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status. (The operating system's ru_maxrss counts the parent's memory too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[60, 1000])
    parser.add_argument("--scratch", help="folder with room for the largest text")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    found = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        text, tokenizer = Path(scratch, "text.txt"), Path(scratch, "tokenizer")
        for megabytes in args.megabytes:
            write_text(text, megabytes)
            if not tokenizer.exists():
                train_tokenizer(text, tokenizer)
            words = [sys.executable, __file__, "--measure", str(text), str(tokenizer)]
            runs = [
                json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
                for _ in range(3)
            ]
            found[f"{megabytes} MB"] = min(runs, key=lambda run: run["seconds"])
    rows = [(name, f"{run['seconds']:.2f}", f"{run['peak_mb']:.0f}") for name, run in found.items()]
    print_table(
        f"{SAMPLES} samples of {CTX_LEN} tokens from one .txt", ["text", "seconds", "MB above the tokenizer"], rows
    )
    write_record("texts", {"samples": SAMPLES, "ctx_len": CTX_LEN, "texts": found})


if __name__ == "__main__":
    main()
