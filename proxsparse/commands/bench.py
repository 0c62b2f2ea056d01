"""What 2:4 gains on this machine: prefill and decoding, tokens per second and memory, dense compared with sparse.

    python -m proxsparse bench --model runs/demo/pruned
    python -m proxsparse bench --model runs/demo/pruned --prompt 1024 \\
        --tokens 64 --dtype bfloat16

Sparse means: on a CPU the pruned linear layers compute from compact weights; on a GPU from torch's semi-structured
tensors, for those shapes where a quick measurement shows a gain. Dense and sparse are measured in one process, on the
same weights. Compact weights have int8 values with --quantize int8, and where the model's files hold int8 values.
With --graph the prefill and each step of decoding are CUDA graphs, so that the host hardly counts; inference servers
decode that way.
"""

import argparse
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.utils import ModelOutput

from proxsparse.commands.cli import Parser, command, positive_int, print_json
from proxsparse.commands.groups import add_model_arguments, describe_device, load
from proxsparse.deploy.sparse import CompactLinear, stored_kind, use_compact, use_semi_structured
from proxsparse.deploy.timing import recorded, seconds
from proxsparse.errors import RunError, UsageError
from proxsparse.model.compact import KINDS

CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")  # transformers' names for a cache


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--prompt", type=positive_int, default=256, help="tokens to prefill; default: %(default)s")
    parser.add_argument("--tokens", type=positive_int, default=32, help="tokens to decode; default: %(default)s")
    parser.add_argument(
        "--repeat", type=positive_int, default=5, help="measurements, whose median is shown; default: %(default)s"
    )
    parser.add_argument("--quantize", default=None, choices=KINDS, help="compact weights with int8 values, on a CPU")
    parser.add_argument("--graph", action="store_true", help="on a GPU: CUDA graphs, and a cache of fixed size")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    model = load(args)
    model.eval()
    if args.quantize and model.device.type != "cpu":
        raise UsageError(f"--quantize is for compact weights, which need --device cpu; the model is on {model.device}.")
    if args.graph and model.device.type != "cuda":
        raise UsageError(f"--graph is for CUDA graphs, which need a GPU; the model is on {model.device}.")
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if 0 < positions < args.prompt + args.tokens:
        raise UsageError(f"--prompt {args.prompt} and --tokens {args.tokens} are more than the model's positions.")
    try:
        decode(model, torch.ones(1, 1, dtype=torch.long, device=model.device), 4)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's own code, before anything of ours is in it
        raise RunError(f"{type(model).__name__} can't decode with its cache here: {error}") from error
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (1, args.prompt), device=model.device)
    kind = args.quantize or stored_kind(args.model, args.revision)
    try:
        rows = {"dense": measure(model, ids, args), "sparse": measure_sparse(model, ids, args, kind)}
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's own code, or of CUDA
        if not args.graph:
            raise
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"{type(model).__name__} can't run as CUDA graphs, so leave --graph out: {line}") from error
    dtype, device = str(model.dtype).removeprefix("torch."), describe_device(model.device)
    show(rows, f"{dtype} on {device}" + (", CUDA graphs" if args.graph else ""))
    measured = {"graph": args.graph, "prompt": args.prompt, "tokens": args.tokens}
    print_json({"model": args.model, "device": device, "dtype": str(model.dtype), **measured, **rows})


def measure_sparse(model: PreTrainedModel, ids: Tensor, args: argparse.Namespace, kind: str | None) -> dict[str, float]:
    """Prefill and decoding with sparse weights; on a GPU, each with the weights that gain at its number of rows."""
    if model.device.type != "cuda":
        print(f"{use_compact(model, kind)} linear layers are compact" + (f", with {kind} values" if kind else ""))
        return measure(model, ids, args)
    found: dict[str, float] = {}
    for part, tokens in (("prefill", args.prompt), ("decode", 1)):
        converted = use_semi_structured(model, tokens, args.graph)
        counts = f"{converted['sparse']} linear layers are semi-structured, {converted['dense']} stay dense"
        print(f"{part}: {counts} (they gain nothing, or do not fit)")
        found |= measure(model, ids, args, (part,))
    return found


@torch.no_grad()
def measure(
    model: PreTrainedModel, ids: Tensor, args: argparse.Namespace, parts: Sequence[str] = ("prefill", "decode")
) -> dict[str, float]:
    """Tokens per second of prefill and of decoding, and bytes of the weights."""
    found: dict[str, float] = {}
    for part in parts:
        tokens, work = work_of(part, model, ids, args)
        found[f"{part}_tokens_per_second"] = tokens / seconds(work, model.device, args.repeat)
        del work  # and the memory of its graph
    compact = [module for module in model.modules() if isinstance(module, CompactLinear)]
    size = sum(module.nbytes for module in compact)
    for parameter in model.parameters():
        packed = getattr(parameter, "packed", None)  # semi-structured tensors hold values and positions
        inner = [t for t in (packed, getattr(parameter, "meta", None)) if t is not None] or [parameter]
        size += sum(t.numel() * t.element_size() for t in inner)
    return found | {"weight_bytes": size}


def work_of(
    part: str, model: PreTrainedModel, ids: Tensor, args: argparse.Namespace
) -> tuple[int, Callable[[], object]]:
    """How many tokens a part takes, and the work to be timed; with --graph it is recorded.

    Raises:
        UsageError: the model keeps no cache that a graph can use.
    """
    takes = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    first, tokens = ids[:, :1], args.tokens + 1
    if not args.graph:
        prefill = partial(model, input_ids=ids, use_cache=False, **last)
        works = {"prefill": (args.prompt, prefill), "decode": (tokens, partial(decode, model, first, tokens))}
        return works[part]
    if "past_key_values" not in takes:
        raise UsageError(
            f"--graph needs a model with a cache of keys and values, which {type(model).__name__} has not."
        )
    if part == "prefill":
        # Without a cache transformers looks for packed sequences, and masks them where it can't wait for the answer.
        return args.prompt, recorded(
            lambda: model(input_ids=ids, use_cache=True, past_key_values=DynamicCache(), **last)
        )
    decoding = StaticDecoding(model, first, tokens)
    step = recorded(decoding.step)
    return tokens, lambda: decoding.run(step)


class StaticDecoding:
    """Decoding with a cache of fixed size: every token takes the same work on the same memory, as a graph needs it."""

    def __init__(self, model: PreTrainedModel, first: Tensor, tokens: int):
        self.model, self.first, self.tokens = model, first, tokens
        self.token = first.clone()  # the one to feed
        size = max(tokens, 4)  # three tokens are fed before the recording, which is the fourth
        self.cache = StaticCache(config=model.config, max_cache_len=size)
        # A layer with a sliding window keeps its length as a number of Python's, which a graph would freeze. The
        # model's own mask is what limits attention to the window.
        self.cache.layers = [
            StaticLayer(size) if type(layer) is StaticSlidingWindowLayer else layer for layer in self.cache.layers
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Feed one token, and put the likeliest next one in its place."""
        out = self.model(input_ids=self.token, use_cache=True, past_key_values=self.cache)
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def run(self, step: Callable[[], object]) -> None:
        """Decode from the start: ``step`` once per token."""
        self.cache.reset()
        self.token.copy_(self.first)
        for _ in range(self.tokens):
            step()


@torch.no_grad()
def decode(model: PreTrainedModel, token: Tensor, tokens: int) -> None:
    """Feed the model tokens one at a time, the likeliest after the one before, with its cache."""
    cache: dict[str, Any] = {}
    for _ in range(tokens):
        out = model(input_ids=token, use_cache=True, **cache)
        cache, token = cache_of(model, out), out.logits[:, -1:].argmax(-1)


def cache_of(model: PreTrainedModel, out: ModelOutput) -> dict[str, Any]:
    """What a model keeps of the tokens so far, as the argument that takes it back.

    Raises:
        UsageError: the model keeps nothing, so every token would be computed from all tokens before it.
    """
    takes = inspect.signature(model.forward).parameters
    for name in CACHES:
        if name in takes and out.get(name) is not None:
            return {name: out[name]}
    raise UsageError(f"{type(model).__name__} keeps no cache, so there is no decoding to measure.")


def show(rows: dict[str, dict[str, float]], title: str) -> None:
    table = Table(title=title)
    for head in ("weights", "prefill tokens/s", "decode tokens/s", "weights, MB"):
        table.add_column(head, justify="left" if head == "weights" else "right")
    for name, row in rows.items():
        prefill, decode = row["prefill_tokens_per_second"], row["decode_tokens_per_second"]
        table.add_row(name, f"{prefill:,.1f}", f"{decode:,.1f}", f"{row['weight_bytes'] / 1e6:,.1f}")
    gain = [rows["sparse"][key] / rows["dense"][key] for key in rows["dense"]]
    table.add_row("sparse / dense", *(f"{value:.2f}" for value in gain), style="bold")
    Console().print(table)
