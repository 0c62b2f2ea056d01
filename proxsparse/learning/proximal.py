"""The proximal step of a run: the operator on every pruned weight after each optimizer step, and what it shows."""

import logging
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from proxsparse.errors import RunError, UsageError, doing
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.feedback import ShareController
from proxsparse.model.prunable import Prunable
from proxsparse.model.sharding import first_entry, total
from proxsparse.operator.masked import code_bytes, survey_mask_
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.operator.prox import expand_scale, kernel_for, non_finite, prox_counted_
from proxsparse.operator.rounding import Noise, noise_seed
from proxsparse.record import read_json, write_json
from proxsparse.resume import resume_hint

logger = logging.getLogger(__name__)
CONTROLLERS_FILE = "auto_lambda.json"


class ProxCallback(TrainerCallback):
    """Calls ``proximal_step(step, max_steps)`` once after each optimizer step that was not skipped."""

    def __init__(self, proximal_step):
        self.proximal_step = proximal_step
        self._scale = None

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        scaler = getattr(optimizer, "scaler", None)
        self._scale = scaler.get_scale() if scaler is not None else None

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # After an overflow the fused optimizers do not report the step as skipped, but the loss scale falls.
        scaler = getattr(optimizer, "scaler", None)
        overflowed = scaler is not None and scaler.get_scale() < self._scale
        if not (overflowed or getattr(optimizer, "step_was_skipped", False)):
            with doing(f"step {state.global_step + 1} of learning"):
                self.proximal_step(state.global_step, state.max_steps)


class ProximalStep:
    """The operator on all pruned weights, each with its lambda1 of this step.

    Made while the weights are the original ones, whose scales are the units of relative settings. Of other patterns
    than 2:4 it only watches the mask.

    Args:
        targets: the pruned weights; of sharded ones, every process moves its rows.
        args: the run's settings.
        norms: name -> input norms of the rows stored here, where blocks compare contributions; else None.

    Attributes:
        rms: name -> root mean square of the weight, and of its scores, where settings are relative.
        seconds: spent in the operator since ``progress`` was last called.

    Raises:
        UsageError: a weight without a scale.
    """

    def __init__(self, targets: list[Prunable], args: ProxSparseConfig, norms: dict[str, Tensor] | None):
        self.targets, self.args, self.norms = targets, args, norms
        relative = args.relative or args.auto_lambda
        self.rms = {t.name: self._root_mean_square(t) for t in targets} if relative else {}
        # Layer-wise steps move blocks further than the loss does: strict feedback would swing.
        strictness = 0.5 if args.layer_rate else 1.0
        names = [t.name for t in targets] if args.auto_lambda else []
        self.controllers = {name: ShareController(args.target_share, strictness=strictness) for name in names}
        self.seconds = 0.0
        # (weights, 2): 2:4 blocks and blocks of each, after the last step; zeros before the first
        self._counts = torch.zeros(len(targets), 2, dtype=torch.int64)
        self._stepped = False
        self._codes: dict[str, Tensor] = {}  # the pattern of every block when it was last looked at

    def __call__(self, step: int, max_steps: int) -> None:
        """After optimizer step ``step``, counted from 0, of ``max_steps``."""
        self._stepped = True
        if self.args.wanted != TWO_OF_FOUR:
            return
        start = time.perf_counter()
        devices = {target.stored.device for target in self.targets}
        # Per weight: 2:4 blocks, and blocks with NaN or infinite entries. They are read once, after the last weight.
        counts = {device: torch.zeros(len(self.targets), 2, dtype=torch.int32, device=device) for device in devices}
        for place, target in enumerate(self.targets):
            weight = target.stored
            if not weight.numel():  # an empty shard
                continue
            seed = noise_seed(self.args.seed + 1, step, place)
            stochastic = self.args.rounding == "stochastic" and weight.dtype == torch.bfloat16
            prox_counted_(
                target.rows(weight),
                self.strength(target, step, max_steps),
                counts[weight.device][place],
                scale=self._scale(target),
                noise=Noise(seed, first_entry(target.weight)) if stochastic else None,
            )
        self._take_in(torch.stack([found.cpu() for found in counts.values()]).sum(0), step, max_steps)
        self.seconds += time.perf_counter() - start

    def _take_in(self, found: Tensor, step: int, max_steps: int) -> None:
        """Refuse non-finite weights, and keep the counts of blocks for the controllers and the log.

        Args:
            found: (weights, 2), 2:4 and non-finite blocks of what is stored here.
        """
        blocks = torch.tensor([target.stored.numel() // 4 for target in self.targets])
        sparse, bad, blocks = self.total(torch.column_stack((found, blocks))).cpu().unbind(1)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise RunError(
                f"{self.targets[first].name} at step {step + 1}: {non_finite(int(bad[first]))} "
                f"{resume_hint(str(self.args.output_dir))}"
            )
        self._counts = torch.column_stack((sparse, blocks))
        for target, (blocks_24, of) in zip(self.targets, self._counts.tolist(), strict=True):
            if self.controllers:
                self.controllers[target.name].observe(blocks_24 / of, step + 1, max_steps)

    def warm_up(self) -> None:
        """Compile what the steps will run, on a few rows of each kind: the first step is as fast as others."""
        pattern = self.args.wanted
        kernel = f"kernel '{kernel_for(self.targets[0].stored)}', {len(self.targets)} weights"
        none = f"it is for 2:4, so lambda is 0 and {pattern} is learned without it"
        logger.info("proximal operator: %s", kernel if pattern == TWO_OF_FOUR else none)
        here = [target for target in self.targets if target.stored.numel()]  # not a shard without rows
        kinds = {(t.rows(t.stored).shape[-1], t.stored.dtype, t.stored.device): t for t in here}
        for (width, dtype, device), target in kinds.items():
            scale = self._scale(target)
            own = None if scale is None else scale.view(-1, width)[0]
            noise = Noise(0) if self.args.rounding == "stochastic" and dtype == torch.bfloat16 else None
            # A program works on one row where there is a scale; else 64 fill one. Small values are solved at once.
            rows = torch.full((64 if own is None else 1, width), 1e-3, dtype=dtype, device=device)
            if pattern == TWO_OF_FOUR:
                prox_counted_(rows, 1.0, torch.zeros(2, dtype=torch.int32, device=device), scale=own, noise=noise)
            codes = torch.zeros(code_bytes(rows.numel(), pattern), dtype=torch.uint8, device=device)
            survey_mask_(rows, codes, pattern, own)

    def strength(self, target: Prunable, step: int, max_steps: int) -> float:
        """lambda1 of one weight in this step."""
        if self.controllers:
            return self.controllers[target.name].strength() / self.rms[target.name][1]
        ramp = self.args.lambda_ramp * max_steps
        strength = float(self.args.lambda_value) * (min(1.0, (step + 1) / ramp) if ramp else 1.0)
        return strength / self.rms[target.name][1] if self.args.relative else strength

    def progress(self) -> dict[str, float]:
        """What the log shows of the blocks; empty before the first step. Every process calls this."""
        if not self._stepped:
            return {}
        pattern = self.args.wanted
        # Per device: mask entries that changed, the penalty, entries. They are read once, after the last weight.
        found: dict[torch.device, Tensor] = {}
        for target in self.targets:
            rows = target.rows(target.stored)
            if not rows.numel():
                continue
            fresh = target.name not in self._codes
            if fresh:
                self._codes[target.name] = rows.new_zeros(code_bytes(rows.numel(), pattern), dtype=torch.uint8)
            seen = survey_mask_(rows, self._codes[target.name], pattern, self._scale(target))
            seen = torch.cat((seen[:1] * (not fresh), seen[1:], seen.new_full((1,), rows.numel())))
            found[rows.device] = found.get(rows.device, torch.zeros_like(seen)) + seen
        sums = sum((part.cpu() for part in found.values()), torch.zeros(3, dtype=torch.float64))
        changed, penalty, entries = self.total(sums).tolist()
        if pattern != TWO_OF_FOUR:
            return {"mask_churn": changed / entries}
        blocks_24, blocks = self._counts.sum(0).tolist()
        seconds, self.seconds = self.seconds, 0.0
        return {
            "share_24": blocks_24 / blocks,
            "mask_churn": changed / entries,
            "regularizer": penalty,
            "prox_seconds": seconds,
        }

    def share_by_layer(self) -> list[float | None]:
        """Share of 2:4 blocks of every layer; None: nothing of it is pruned."""
        by_layer = torch.zeros(self.targets[-1].block + 1, 2, dtype=torch.int64)
        by_layer.index_add_(0, torch.tensor([t.block for t in self.targets]), self._counts)
        return [blocks_24 / blocks if blocks else None for blocks_24, blocks in by_layer.tolist()]

    def save(self, folder: Path) -> None:
        """Write what the next steps depend on into the folder of a checkpoint."""
        if self.controllers:
            write_json(folder / CONTROLLERS_FILE, {n: c.state() for n, c in self.controllers.items()})

    def restore(self, folder: Path) -> None:
        if self.controllers:
            for name, state in read_json(folder / CONTROLLERS_FILE).items():
                self.controllers[name].restore(state)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes that share the weights."""
        return total(values, self.targets[0].weight)

    def _scale(self, target: Prunable) -> Tensor | None:
        return None if self.norms is None else self.norms[target.name]

    def _root_mean_square(self, target: Prunable) -> tuple[float, float]:
        """Of the original weight, and of its scores: the units of learning rate and lambda."""
        rows, scale = target.rows(target.stored).float(), self._scale(target)
        scores = rows if scale is None else rows * expand_scale(scale, rows)
        squares = self.total(torch.stack([rows.square().sum(), scores.square().sum()]))
        plain, scored = (squares / target.weight.numel()).sqrt().tolist()
        if not plain > 0 or not scored > 0:
            found = "has NaN entries" if plain != plain or scored != scored else "is zero, or nearly so"
            raise UsageError(f"{target.name} {found}, so it has no scale. Leave it out with `exclude`.")
        return plain, scored
