"""How peft computes and merges a LoRA adapter whose product is masked. Needs peft; ``proxsparse.deploy.lora`` loads it.

Shapes: O = out_features, I = in_features, R = rank. A is (R, I) and B is (O, R).
"""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from proxsparse.model.bits import pack_bits, unpack_bits


class MaskedAdapter(LoraVariant):
    """The adapter of one layer adds mask * (B A) * scale to its weight: while it trains, and when it is merged.

    peft would compute B (A x), which never forms B A. That is not possible under a mask, so a training step forms the
    whole matrix, as the merge does.

    Args:
        kept: the mask in the layout of the layer's weight, True = keep.
    """

    def __init__(self, kept: Tensor):
        self._shape, self._packed = kept.shape, pack_bits(kept)

    def supports_lora_conversion(self) -> bool:
        """It is no product of two small matrices, which is what peft would convert to."""
        return False

    def delta(self, module: Any, active_adapter: str) -> Tensor:
        """What is added to the weight, in its layout; gradients flow to A and B."""
        product = module.get_delta_weight(active_adapter)
        self._packed = self._packed.to(product.device)
        return product.masked_fill(~unpack_bits(self._packed, self._shape), 0.0)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        delta = self.delta(module, active_adapter)
        x = module.lora_dropout[active_adapter](x)
        added = torch.nn.functional.linear(x, delta.T if module.fan_in_fan_out else delta)
        bias = module.lora_B[active_adapter].bias
        return result + (added if bias is None else added + bias * module.scaling[active_adapter])

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight + self.delta(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        orig_weight.data += self.delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight - self.delta(module, active_adapter).to(orig_weight.dtype)
