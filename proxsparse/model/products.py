"""What is multiplied with a weight, seen at the matrix product itself.

Stacked experts come in many modules: some route by themselves, some are given sorted tokens, some one expert at a
time. All of them end in a product of inputs with a part of the parameter, and that product tells everything: which
part it is by where it lies in memory, and what flows into it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from proxsparse.model.prunable import Prunable

_LINEAR = {torch.nn.functional.linear}
_MATMUL = {torch.bmm, torch.matmul, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__}


class Products(TorchFunctionMode):
    """While entered: call ``visit(target, expert, inputs)`` for every product of inputs with a part of a target.

    Products that are made of a copy of the weight (another dtype) are not seen.

    Args:
        targets: whose weights are stacks of experts: (E, I, O), (E, O, I), or experts one under another in 2-D.
        visit: ``expert`` is the index in the stack, or None for a 2-D weight; ``inputs`` is (T, I).
    """

    def __init__(self, targets: list[Prunable], visit: Callable[[Prunable, int | None, Tensor], None]):
        super().__init__()
        self.visit = visit
        self.owners = {target.weight.untyped_storage().data_ptr(): target for target in targets}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _LINEAR and len(args) > 1:
            self._see(args[0], args[1], -1)
        elif func in _MATMUL and len(args) == 2:
            self._see(args[0], args[1], -2)
        return func(*args, **(kwargs or {}))

    def _see(self, inputs: Any, weight: Any, contracted: int) -> None:
        """Find the target that a factor is a part of, and hand on what it is multiplied with."""
        if not isinstance(weight, Tensor) or not isinstance(inputs, Tensor):
            return
        target = self.owners.get(weight.untyped_storage().data_ptr())
        if target is None or weight.dim() not in (2, 3):
            return
        inputs = inputs.detach()
        if weight.dim() == 3:  # all experts at once, each with inputs of its own
            inputs = inputs if inputs.dim() == 3 else inputs[None]
            for expert, own in enumerate(inputs.expand(len(weight), *inputs.shape[1:])):
                # Llama 4 gives every expert all tokens, and zeros for those of other experts.
                self.visit(target, expert, own[own.any(-1)])
            return
        flat = inputs.reshape(-1, inputs.shape[-1])
        whole = target.weight
        start = weight.storage_offset() - whole.storage_offset()
        if whole.dim() == 3:
            self.visit(target, start // whole.stride(0), flat)
            return
        width = whole.shape[target.in_dim]
        if flat.shape[1] < width:  # one expert's inputs, which are a part of the input dimension
            first = start // whole.stride(target.in_dim)
            padded = flat.new_zeros(len(flat), width)
            padded[:, first : first + flat.shape[1]] = flat
            flat = padded
        self.visit(target, None, flat)
