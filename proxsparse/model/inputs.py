"""The inputs of the prunable weights: hooks that see them, and the norms by which weights are scored.

Source of the score |w_ij| * ||x_j||_2: Sun et al., Wanda, https://arxiv.org/abs/2306.11695.
Shapes: I = in_features; E = experts; T = tokens.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from proxsparse.errors import RunError, UsageError
from proxsparse.model.linears import is_plain
from proxsparse.model.products import Products
from proxsparse.model.prunable import Prunable, decoder_of
from proxsparse.model.restoring import evaluation_mode
from proxsparse.model.sharding import reshard
from proxsparse.record import atomic_path

logger = logging.getLogger(__name__)

NORMS_FILE = "input_norms.safetensors"
Visit = Callable[[Prunable, int | None, Tensor], None]


@contextlib.contextmanager
def listen(targets: list[Prunable], visit: Visit) -> Iterator[set[str]]:
    """Call ``visit(target, expert, inputs)`` for all inputs of the targets, inside the with block.

    ``inputs`` is (T, I) float32. ``expert`` is None except for stacked experts, which are visited one at a time with
    the tokens routed to them. Linear layers are seen when they are called, transformers' own stacked experts when
    tokens are routed to them, all other experts at their matrix products.

    Yields:
        The names of the targets that were visited, as they come.
    """
    seen: set[str] = set()
    by_module: dict[nn.Module, list[Prunable]] = {}
    for target in targets:
        by_module.setdefault(target.module, []).append(target)
    entered: dict[nn.Module, list[Products]] = {}

    def remember(target: Prunable, expert: int | None, inputs: Tensor) -> None:
        seen.add(target.name)
        with torch.autocast(target.weight.device.type, enabled=False):  # statistics are float32
            visit(target, expert, inputs.reshape(-1, inputs.shape[-1]).float())

    def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        members = by_module[module]
        if hasattr(module, "has_gate"):
            with torch.autocast(members[0].weight.device.type, enabled=False):
                _visit_experts(module, arguments, keywords, members, remember)
            return
        inputs = (arguments[0] if arguments else next(iter(keywords.values()))).detach()
        for target in members:
            remember(target, None, inputs)

    def enter(module: nn.Module, *_: Any) -> None:
        products = Products(by_module[module], remember)
        products.__enter__()
        entered.setdefault(module, []).append(products)

    def leave(module: nn.Module, *_: Any) -> None:
        entered[module].pop().__exit__(None, None, None)

    handles: list[Any] = []
    for module in by_module:
        if is_plain(module) or hasattr(module, "has_gate"):
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _visit_experts(module: Any, arguments: tuple, keywords: dict, members: list[Prunable], visit: Visit) -> None:
    """Route the tokens as the module will, and recompute what its second projection sees."""
    hidden, chosen = (*arguments, *keywords.values())[:2]
    hidden = hidden.detach().reshape(-1, hidden.shape[-1]).to(members[0].weight.dtype)
    chosen = chosen.reshape(len(hidden), -1)
    by_attribute = {target.attribute: target for target in members}
    first = by_attribute.get("gate_up_proj") or by_attribute.get("up_proj")
    second = by_attribute.get("down_proj")
    for expert in chosen.unique().tolist():
        first_name = "gate_up_proj" if module.has_gate else "up_proj"
        weight = getattr(module, first_name)
        if expert >= len(weight):  # padding of the router
            continue
        tokens = hidden[(chosen == expert).any(-1)]
        if first is not None:
            visit(first, expert, tokens)
        if second is not None:
            weight = weight[expert].detach()
            middle = tokens @ (weight if module.is_transposed else weight.T)
            bias = getattr(module, f"{first_name}_bias", None)
            middle = middle if bias is None else middle + bias[expert].detach()
            middle = module._apply_gate(middle) if module.has_gate else module.act_fn(middle)
            visit(second, expert, middle.detach())


class NormStatistic:
    """Running mean of the squared inputs of one weight: (I,), or (E, I) for stacked experts."""

    def __init__(self, target: Prunable):
        weight, self.name = target.weight, target.name
        shape = (weight.shape[target.in_dim],) if weight.dim() == 2 else (weight.shape[0], weight.shape[target.in_dim])
        self.squares = torch.zeros(shape, device=weight.device)
        self.tokens = torch.zeros(shape[:-1], device=weight.device)

    def add(self, expert: int | None, inputs: Tensor) -> None:
        place = ... if expert is None else expert
        # A weight that is offloaded lies on the CPU, and its inputs do not.
        self.squares[place] += inputs.square().sum(0).to(self.squares.device)
        self.tokens[place] += len(inputs)

    def norm(self) -> Tensor:
        """Root mean square of every input: at least a thousandth of their mean, and 1 where no input was seen.

        Raises:
            RunError: an input was not finite.
        """
        if not self.squares.isfinite().all():
            raise RunError(f"The inputs of {self.name} are not finite on the calibration text: the model overflows.")
        rms = (self.squares / self.tokens.clamp_min(1)[..., None]).sqrt()
        mean = rms.mean(-1, keepdim=True)
        return rms.maximum(torch.where(mean > 0, 1e-3 * mean, torch.ones_like(mean)))


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, targets: list[Prunable], windows: Tensor, *, progress: str | None = None
) -> dict[str, Tensor]:
    """Root mean square of every input feature of every prunable weight, over all tokens of the windows.

    Args:
        windows: (n, ctx_len) token ids.

    Returns:
        name of the weight -> (I,) float32 on the CPU, (E, I) for stacked experts.
    """
    statistics = {target.name: NormStatistic(target) for target in targets}
    # FSDP2 gathers weights on the way through the whole model only; else the LM head can be left out.
    forward = model if isinstance(model, FSDPModule) else decoder_of(model)
    add = lambda target, expert, inputs: statistics[target.name].add(expert, inputs)  # noqa: E731
    with evaluation_mode(model), listen(targets, add) as seen:
        for window in tqdm(windows, desc=progress, disable=None if progress else True, leave=False):
            forward(input_ids=window[None].to(model.device), use_cache=False)
    reshard(model)
    note_unseen([target for target in targets if target.name not in seen])
    return {name: statistic.norm().cpu() for name, statistic in statistics.items()}


def note_unseen(targets: list[Prunable], entries_are: str = "compared by magnitude alone") -> None:
    """Say for which weights no input was seen, if there are any, and what becomes of their entries."""
    kinds = sorted({re.sub(r"\.\d+(?=\.)", ".*", target.kind) for target in targets})
    if kinds:
        logger.warning(
            "note: no inputs were seen of %d weights (%s); their entries are %s",
            len(targets),
            ", ".join(kinds),
            entries_are,
        )


def digest(windows: Tensor) -> str:
    """SHA-256 of token ids, by which a run knows its text again."""
    return hashlib.sha256(windows.to(torch.int64).contiguous().cpu().numpy().tobytes()).hexdigest()


def weight_sum(model: nn.Module) -> float:
    """Sum of |w| over all parameters, by which a run knows its model again whatever it is called.

    Rounded to nine digits, which do not depend on the order of sums.
    """
    return float(f"{sum(float(p.detach().double().abs().sum()) for p in model.parameters()):.8e}")


def origin_of(model: PreTrainedModel, windows: Tensor) -> dict[str, str]:
    """What something that is kept in a file was measured on: the name of the model, and the digest of the text."""
    return {"model": str(model.config._name_or_path), "text": digest(windows)}


def stored_norms(
    path: Path, model: PreTrainedModel, targets: list[Prunable], windows: Tensor, *, first: bool = True
) -> dict[str, Tensor]:
    """Input norms that are measured once and kept in a file, so that a resumed run has the same.

    Args:
        path: the file; it is read where it exists.
        first: whether this process is the one that shows progress and writes.

    Returns:
        name -> (I,) norms in the order of ``targets``, wherever they come from: processes send them to each other.

    Raises:
        UsageError: the file was measured on another model or text, or for other weights.
    """
    origin = origin_of(model, windows)
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("origin", "{}"))
            other = next((f"on another {key}" for key in ("model", "text") if found.get(key) != origin[key]), None)
            if not other and not {target.name for target in targets} <= set(file.keys()):
                other = "for other weights"
            if other:
                raise UsageError(f"{path} was measured {other}: give another `output_dir`, or delete it.")
            return {target.name: file.get_tensor(target.name) for target in targets}
    norms = input_norms(model, targets, windows, progress="input norms" if first else None)
    if first:
        with atomic_path(path) as scratch:
            # One entry: safetensors writes several in random order.
            save_file(norms, scratch, metadata={"origin": json.dumps(origin)})
    return norms
