"""The console program: ``proxsparse COMMAND ...``, the same code as the scripts of the repository."""

import importlib
import sys
from collections.abc import Sequence

# name -> (module of proxsparse.commands, what it does)
COMMANDS = {
    "learn": ("learn", "learn a 2:4 mask (end-to-end/main.py)"),
    "plan": ("plan", "what a learning run will need: steps and memory"),
    "extract": ("extract", "take the mask from a learned checkpoint (end-to-end/mask_op.py)"),
    "apply": ("apply", "put a mask on the original weights; measure, save (eval/eval_mask_ppl.py)"),
    "eval": ("eval", "perplexity and sparsity of a checkpoint (eval/ppl.py)"),
    "zero-shot": ("zero_shot", "accuracy on zero-shot tasks (eval/zero_shot.py)"),
    "prune": ("prune", "prune with a baseline (baseline/main.py)"),
    "export": ("export", "write the pruned checkpoint, the mask alone, or the compact form"),
    "recover": ("recover", "update the kept weights of a pruned model; the mask stays as it is"),
    "merge": ("merge", "merge a LoRA adapter into a pruned model, which stays pruned"),
    "check": ("check", "is a checkpoint 2:4, and is everything else unchanged?"),
    "bench": ("bench", "what 2:4 gains on this machine: tokens per second, dense compared with sparse"),
    "report": ("report", "table, pictures and report.html of a run (eval/report.py)"),
    "download": ("download", "the authors' pruned models (proxsparse_pruned_model_download.py)"),
    "operator": ("operator", "try the proximal operator (end-to-end/prox_op.py)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        return say(usage()) or (0 if arguments else 2)
    name = arguments[0]
    if name in ("-V", "--version"):
        from proxsparse import __version__

        return say(f"proxsparse {__version__}")
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}; the commands are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    sys.argv[0] = f"proxsparse {name}"
    return importlib.import_module(f"proxsparse.commands.{COMMANDS[name][0]}").main(arguments[1:])


def say(text: str) -> int:
    """Print, and give the exit code: who reads it may have gone, and a disk may be full."""
    try:
        print(text, flush=True)
    except OSError as error:
        from proxsparse.commands.cli import end

        return end(error)
    return 0


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: proxsparse COMMAND [flags]\n\n{rows}\n\nproxsparse COMMAND --help shows a command's flags."


if __name__ == "__main__":
    sys.exit(main())
