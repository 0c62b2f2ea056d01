"""Leave a model as it came, whatever a trainer does to it in between."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from proxsparse.model.channels import MARK, mark, order_of


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Inside, a module and its parts are in evaluation mode; after it, each is in the mode that it was in."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


@contextlib.contextmanager
def restored(model: PreTrainedModel, weights: bool = True) -> Iterator[None]:
    """Inside the block a trainer may use the model; after it, the model is as it was before.

    Put back are the weights and the order of their channels, which of them need gradients, training or evaluation mode,
    the forward method (a trainer wraps it for mixed precision), activation checkpointing, and both configurations.
    Gradients are computed inside, also where the caller has switched them off.

    Args:
        weights: False where the weights do not move; else a copy of them waits in host memory.
    """
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()} if weights else {}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    forward = {name: value for name, value in vars(model).items() if name == "forward"}
    order = order_of(model)
    training = {part: part.training for part in model.modules()}
    checkpointing = model.is_activation_checkpointing
    config = copy.deepcopy(vars(model.config))
    # A model of code of its own may have none.
    generation = copy.deepcopy({n: value for n, value in vars(model).items() if n == "generation_config"})
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's code is in
            yield
    finally:
        vars(model.config).clear()
        vars(model.config).update(config)
        vars(model).pop("generation_config", None)
        vars(model).update(generation)
        model.__dict__.pop("forward", None)
        model.__dict__.update(forward)
        if model.is_activation_checkpointing and not checkpointing:
            model.activation_checkpointing_disable()
        for part, mode in training.items():
            part.training = mode
        if weights:
            setattr(model, MARK, order)  # the configuration is as it was, with what it notes
        elif order_of(model):
            mark(model, order_of(model))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
                if name in gradients:
                    parameter.requires_grad_(gradients[name])
                parameter.grad = None
