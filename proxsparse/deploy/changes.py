"""What becomes of each tensor of a checkpoint's files when a model is pruned: zeros, new values, another order."""

from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.errors import RunError, UsageError
from proxsparse.mask import Mask, fit_mask, is_pruned_by
from proxsparse.model.channels import order_in
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.layout import Group, Layout
from proxsparse.model.prunable import Prunable


class Changes:
    """What becomes of each tensor of the base's files.

    Args:
        base: the files.
        model: of their class; with values, those are written where they differ.
        mask: mask of its parameters.
    """

    def __init__(self, base: Checkpoint, model: PreTrainedModel, mask: Mask):
        self.targets: dict[str, Prunable] = fit_mask(model, mask)
        self.mask = mask
        self.layout = Layout(base.tensors, model)
        self.values = {name: t.detach() for name, t in model.state_dict().items() if not t.is_meta}
        missing = sorted(set(mask.tensors) - set(self.layout.of_parameter))
        if missing:
            raise RunError(f"The files of {base.name} lack {len(missing)} weights of the mask, as {missing[0]}.")
        self.moved = set() if self._in_order(base) else {move.name for move in mask.order.moves}
        self._kept: dict[str, Tensor] = {}  # by name in the files, of groups at work
        self._new: dict[str, Tensor] = {}

    def of(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tensor to write, and which of its entries are kept where it is pruned, both as the files hold them."""
        group = self.layout.of_stored.get(name)
        if group is None:  # a part that the model's class lacks, as a vision tower
            return tensor, None
        if name not in self._kept and name not in self._new:
            self._work_out(group)
        kept, new = self._kept.pop(name, None), self._new.pop(name, None)
        if new is not None:
            same = tensor.to(new.dtype) == new
            if not (same if kept is None else same | ~kept).all():
                tensor = new.to(tensor.dtype)
        if kept is not None:
            tensor = tensor.masked_fill(~kept, 0.0)
        return tensor, kept

    def _in_order(self, base: Checkpoint) -> bool:
        """Whether the files hold the channels in the mask's order already, as those of a pruned checkpoint do.

        Raises:
            UsageError: they hold them in another one.
        """
        order, own = self.mask.order, order_in(base.folder, base.config)
        # Files that are pruned by the mask were written in its order, whatever they remember.
        if own == order or (not own and is_pruned_by(self.mask, self.targets, self._read)):
            return True
        if own or not order.moves:
            raise UsageError(
                f"The channels of {base.name} stand in another order than the mask's: give the model that it was made "
                "from.",
                "model",
            )
        return False

    def _read(self, target: Prunable) -> Tensor:
        return self.layout.read(self.layout.of_parameter[target.name])[target.name]

    def _work_out(self, group: Group) -> None:
        masks = {
            parameter: self.mask.tensors[parameter].movedim(-1, self.targets[parameter].in_dim)
            for parameter in group.parameters
            if parameter in self.mask.tensors
        }
        if masks:
            self._kept |= group.stored(masks, True)
        values = {name: self.values[name].cpu() for name in group.parameters if name in self.values}
        if not values and self.moved & set(group.parameters):
            values = {name: self.mask.order.of(name, value) for name, value in self.layout.read(group).items()}
        if len(values) == len(group.parameters):
            self._new |= group.stored(values, 0.0)
