"""Leave a model as it came, whatever a trainer does to it in between."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel


@contextlib.contextmanager
def restored(model: PreTrainedModel, weights: bool = True) -> Iterator[None]:
    """Inside the block a trainer may use the model; after it, the model is as it was before.

    Put back are the weights, which of them need gradients, training or evaluation mode, the forward method (a trainer
    wraps it for mixed precision), activation checkpointing and the cache setting.

    Args:
        weights: False where the weights do not move; else a copy of them waits in host memory.
    """
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()} if weights else {}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    forward = {name: value for name, value in vars(model).items() if name == "forward"}
    training, use_cache, checkpointing = model.training, model.config.use_cache, model.is_activation_checkpointing
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        model.__dict__.update(forward)
        model.config.use_cache = use_cache
        if model.is_activation_checkpointing and not checkpointing:
            model.activation_checkpointing_disable()
        model.train(training)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
                if name in gradients:
                    parameter.requires_grad_(gradients[name])
                parameter.grad = None
