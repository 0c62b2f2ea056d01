"""Recover a pruned model one layer after the other: the outputs of each come close to those of the dense layer.

Only one layer has gradients and optimizer states, and only one is on the accelerator where the model itself is on the
CPU. A pruned layer reads what the recovered layers before it wrote, and a dense one what dense layers wrote. A layer
that is done is kept in a file, so that a run that stopped goes on with the next one.

Shapes: B = windows at once, T = tokens of a window, H = hidden size.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from proxsparse.errors import RunError, UsageError, doing
from proxsparse.learning.keep import keep_mask
from proxsparse.learning.optim import own_optimizer, scale_learning_rates
from proxsparse.mask import Mask
from proxsparse.model.prunable import decoder_blocks
from proxsparse.model.walk import Call, first_inputs, in_sequence, run_block
from proxsparse.record import atomic_path

if TYPE_CHECKING:
    from proxsparse.learning.recover import RecoveryConfig


def check_layers(model: PreTrainedModel, windows: Tensor) -> None:
    """Refuse a model whose layers can't be run one at a time.

    Raises:
        UsageError: they do not run one after the other.
    """
    with torch.no_grad():
        if not in_sequence(model, decoder_blocks(model), windows):
            raise UsageError(f"The layers of a {type(model).__name__} don't run one after the other: use `scope=full`.")


def layers_done(folder: Path) -> bool:
    """Whether a run has left a layer that is done."""
    return any(folder.glob("layer-*.safetensors"))


def recover_layers(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    mask: Mask,
    windows: Tensor,
    config: "RecoveryConfig",
    scales: dict[str, float],
) -> list[dict[str, Any]]:
    """Update the kept weights of each layer, in place.

    Args:
        windows: (N, T) token ids.
        scales: name of a weight that learns -> factor of its learning rate.

    Returns:
        Of each layer, the relative squared error of its outputs at the first and at the last step.

    Raises:
        RunError: a layer diverged.
    """
    blocks, dense_blocks = decoder_blocks(model), decoder_blocks(dense)
    at_once = max(n for n in range(1, config.per_device_train_batch_size + 1) if len(windows) % n == 0)
    with torch.no_grad():
        hidden, calls = first_inputs(model, blocks, windows, "cpu", at_once)
    wanted, history = list(hidden), []
    for index, (block, teacher) in enumerate(zip(tqdm(blocks, desc="layers", disable=None), dense_blocks, strict=True)):
        with doing(f"recovering layer {index}"):
            call = send_to_device(calls[index], config.device)
            wanted = _outputs(teacher, wanted, call, config)
            file = Path(str(config.output_dir)) / f"layer-{index:03}.safetensors"
            if file.is_file():
                block.load_state_dict(load_file(file))
                history.append({"layer": index} | _errors_in(file))
            else:
                with _on(block, config.device):
                    inside = {id(parameter) for parameter in block.parameters()}
                    own = {name: p for name, p in model.named_parameters() if id(p) in inside and name in scales}
                    data = (hidden, wanted, call)
                    history.append({"layer": index} | fit(model, block, mask, data, own, scales, config))
                if config.save_strategy != "no":
                    errors = {name: repr(value) for name, value in history[-1].items()}
                    with atomic_path(file) as scratch:
                        tensors = {name: t.contiguous().clone() for name, t in block.state_dict().items()}
                        save_file(tensors, scratch, metadata=errors)
            hidden = _outputs(block, hidden, call, config)
    return history


def _errors_in(file: Path) -> dict[str, float]:
    """Of a layer that was done before: errors at its first and last step, where its file has them."""
    with safe_open(file, "pt") as stored:
        errors = stored.metadata() or {}
    return {name: float(errors[name]) for name in ("first", "last") if name in errors}


def fit(
    model: PreTrainedModel,
    block: nn.Module,
    mask: Mask,
    data: tuple[list[Tensor], list[Tensor], Call],
    learning: dict[str, nn.Parameter],
    scales: dict[str, float],
    config: "RecoveryConfig",
) -> dict[str, float]:
    """Train one layer under its part of the mask.

    Args:
        data: inputs and wanted outputs (B, T, H) of every step of an epoch, and the layer's other arguments.
        learning: name -> weight, of this layer.
        scales: see ``recover_layers``.

    Returns:
        The relative squared error at the first step, before the layer has learned, and at the last one.
    """
    inputs, wanted, call = data
    adafactor = own_optimizer(config, block)
    assert adafactor is not None  # others are refused
    optimizer = adafactor[0](list(learning.values()), **adafactor[1])
    scale_learning_rates(optimizer, {id(weight): scales[name] for name, weight in learning.items()})
    kept, pruned = None, {name: mask.tensors[name] for name in learning if name in mask.tensors}
    if pruned:
        kept = keep_mask(model, dataclasses.replace(mask, tensors=pruned), optimizer)
    steps = max(1, round(len(inputs) * config.num_train_epochs))
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, config.get_warmup_steps(steps), steps)
    errors = []
    for step in range(steps):
        states, target = (t[step % len(inputs)].to(config.device) for t in (inputs, wanted))
        with _reduced(config):
            made = run_block(block, states, call, config.device)
        error = (made.float() - target.float()).square().mean() / target.float().square().mean()
        if not error.isfinite():
            raise RunError(
                f"The error of a layer's outputs is {error.item()} at step {step + 1}. Lower `learning_rate`."
            )
        error.backward()
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(list(learning.values()), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        errors.append(error.item())
    if kept:
        kept.remove()
    return {"first": errors[0], "last": errors[-1]}


@torch.no_grad()
def _outputs(block: nn.Module, hidden: list[Tensor], call: Call, config: "RecoveryConfig") -> list[Tensor]:
    with _on(block, config.device), _reduced(config):
        return [run_block(block, states, call, config.device).to("cpu", states.dtype) for states in hidden]


@contextlib.contextmanager
def _on(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a layer is on the device that computes."""
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


def _reduced(config: "RecoveryConfig") -> Any:
    return torch.autocast(config.device.type, dtype=torch.bfloat16, enabled=bool(config.bf16))
