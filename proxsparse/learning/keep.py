"""Keep a mask while the weights train: after every step of any PyTorch optimizer, pruned weights are +0.0 again.

    kept = proxsparse.keep_mask(model, mask, optimizer)                        # a loop of your own
    trainer = SFTTrainer(model, ..., callbacks=[proxsparse.KeepMask(mask)])    # any Trainer of transformers

The hook runs after the step itself, so it needs no knowledge of the optimizer, and a step that is skipped changes
nothing. The mask takes one bit per weight, and of a weight that FSDP2 shards every process holds its own part.
"""

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback

from proxsparse.errors import UsageError
from proxsparse.mask import Mask, fit_mask, take_order
from proxsparse.model.bits import pack_bits, unpack_bits
from proxsparse.model.sharding import part_of, reshard


class Kept:
    """A mask that is kept on a model. ``keep_mask`` makes it.

    Args:
        model: the model, which is pruned at once.
        mask: the mask that was made for it.

    Raises:
        UsageError: the model is of another kind, or the mask does not fit it.
    """

    def __init__(self, model: nn.Module, mask: Mask):
        self.model = _plain_model(model)
        self.targets = fit_mask(self.model, mask)
        take_order(self.model, mask, self.targets)
        self._packed: dict[str, Tensor] = {}
        for name, target in self.targets.items():
            own_layout = mask.tensors[name].movedim(-1, target.in_dim)
            part = part_of(own_layout, target.weight).to(target.stored.device)
            self._packed[name] = pack_bits(part)
        self._handle: Any = None
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to +0.0 now. Kept weights keep their bits."""
        reshard(self.model)
        for name, target in self.targets.items():
            weight = target.stored
            kept = unpack_bits(self._packed[name].to(weight.device), weight.shape)
            weight.masked_fill_(~kept, 0.0)

    def attach(self, optimizer: Any) -> None:
        """Apply the mask after every step of an optimizer, until ``remove`` is called.

        Raises:
            UsageError: it offers no hook, or moves none of the masked weights.
        """
        inner = _torch_optimizer(optimizer)
        moved = {id(p) for group in inner.param_groups for p in group["params"]}
        if not any(id(target.weight) in moved for target in self.targets.values()):
            raise UsageError(
                f"The optimizer {type(inner).__name__} moves none of the {len(self.targets)} weights that the mask "
                "prunes: make it from the parameters of this model, after the model is sharded.",
                "optimizer",
            )
        self.remove()
        self._handle = inner.register_step_post_hook(lambda *_: self.apply())

    def remove(self) -> None:
        """Let the optimizer move all weights again. The zeros of now stay until its next step."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def keep_mask(model: nn.Module, mask: Mask, optimizer: Any) -> Kept:
    """Prune a model now, and keep the mask after every step of an optimizer.

    Args:
        model: a causal language model of transformers; also in DistributedDataParallel, compiled, or sharded by FSDP2.
        mask: the mask that was made for it. ``proxsparse.mask_of_pruned`` takes it from the zeros of a pruned model.
        optimizer: a ``torch.optim.Optimizer`` on the model's parameters, or accelerate's wrapper of one.

    Returns:
        What keeps the mask: ``remove()`` ends it, ``apply()`` sets the zeros at any other time.

    Raises:
        UsageError: the mask does not fit the model, or the optimizer does not move its weights or offers no hook.
    """
    kept = Kept(model, mask)
    kept.attach(optimizer)
    return kept


class KeepMask(TrainerCallback):
    """Keeps a mask in any Trainer of transformers or TRL.

    The model is pruned when training begins, after every optimizer step, and once more when training ends.

    Args:
        mask: the mask that was made for the model.

    Raises:
        UsageError: when training begins, as ``keep_mask`` does.
    """

    def __init__(self, mask: Mask):
        self.mask = mask
        self._kept: Kept | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self._kept is not None:  # an earlier training was interrupted
            self._kept.remove()
        self._kept = keep_mask(model, self.mask, optimizer)

    def on_train_end(self, args, state, control, **kwargs):
        if self._kept is not None:
            self._kept.apply()
            self._kept.remove()
            self._kept = None


def _plain_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside its wrappers."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(inner, "peft_config"):
        raise UsageError(
            "The model has adapters, which leave its own weights as they are: make them with masked_lora instead.",
            "model",
        )
    if not isinstance(inner, PreTrainedModel):
        raise UsageError(f"`model` must be a model of transformers; got {type(inner).__name__}.", "model")
    return inner


def _torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrapper, whose steps can be hooked."""
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_post_hooks"):
        raise UsageError(
            f"`optimizer` must be a torch.optim.Optimizer whose step can be hooked; got {type(inner).__name__}. "
            "DeepSpeed's optimizers, which hold copies of the weights, are not supported.",
            "optimizer",
        )
    return inner
