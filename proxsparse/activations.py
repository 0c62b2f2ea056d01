"""Norms of the inputs of every prunable weight: what one weight contributes to the layer's output.

Source of the score |w_ij| * ||x_j||_2: Sun et al., Wanda, https://arxiv.org/abs/2306.11695.
Shapes: I = in_features; T = tokens.
"""

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from proxsparse.prunable import Prunable


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, targets: list[Prunable], windows: Tensor, *, progress: str | None = None
) -> dict[str, Tensor]:
    """Root mean square of every input feature of every prunable weight, over all tokens of the windows.

    Inputs that are hardly ever active get a thousandth of the layer's mean, so that no score vanishes. The second
    projection of stacked experts has no module of its own to listen to, and gets ones.

    Args:
        windows: (n, ctx_len) token ids.

    Returns:
        name of the weight -> (I,) float32 on the CPU.
    """
    squares: dict[nn.Module, Tensor] = {}
    by_module: dict[nn.Module, list[Prunable]] = {}
    for target in targets:
        by_module.setdefault(target.module, []).append(target)

    def listen(module: nn.Module, arguments: tuple) -> None:
        inputs = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
        total = inputs.square().sum(0)
        squares[module] = squares[module] + total if module in squares else total

    handles = [module.register_forward_pre_hook(listen) for module in by_module]
    training = model.training
    model.eval()
    try:
        for window in tqdm(windows, desc=progress, disable=progress is None, leave=False):
            model.get_decoder()(input_ids=window[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    norms = {}
    for module, members in by_module.items():
        rms = (squares[module] / windows.numel()).sqrt().cpu()
        rms = rms.clamp_min(1e-3 * rms.mean().item() or 1.0)
        for target in members:
            width = target.weight.shape[target.in_dim]
            norms[target.name] = rms if len(rms) == width else torch.ones(width)
    return norms
