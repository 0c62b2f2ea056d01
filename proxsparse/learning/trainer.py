"""The learning loop: TRL's SFTTrainer with the proximal step after every optimizer step.

    trainer = ProxSparseTrainer(model, ProxSparseConfig(output_dir="runs/mine"), train_dataset=windows, ...)
    trainer.train()
    mask = trainer.mask()

Three things are added, none by copying the Trainer: a callback applies the operator after each real optimizer step;
in ``training_step`` the objective puts the weights in place with which the loss is computed; ``compute_loss`` asks it
for the loss.
"""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.errors import UsageError, doing
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.distilling import DistillingTrainer
from proxsparse.learning.folder import ZEROS_FILE
from proxsparse.learning.head import plain_head
from proxsparse.learning.layer_steps import LayerSteps, Pace
from proxsparse.learning.objective import Objective
from proxsparse.learning.optim import scale_learning_rates, step_in_backward
from proxsparse.learning.processes import REFUSALS as OF_PROCESSES
from proxsparse.learning.proximal import ProxCallback, ProximalStep
from proxsparse.learning.refusals import refuse
from proxsparse.mask import MASK_FILE, Mask, extract_mask, save_mask
from proxsparse.model.channels import ORDER_FILE, order_of, save_order
from proxsparse.model.inputs import NORMS_FILE, stored_norms
from proxsparse.model.ordering import stored_order
from proxsparse.model.prunable import Prunable, find_prunable, sparsity_by_kind
from proxsparse.model.sharding import matching_part, reshard
from proxsparse.record import write_json


class ProxSparseTrainer(DistillingTrainer):
    """SFTTrainer that learns a mask: 2:4, or another N:M pattern.

    Args:
        model: the pretrained model; its weights at this moment are the original weights W0.
        args: ProxSparseConfig.
        norms: name -> (I,) input norms, or None to measure them on the first training windows.
        kwargs: arguments of SFTTrainer; ``train_dataset`` has a column ``input_ids`` of windows of equal length.

    Raises:
        UsageError: settings that exclude each other, a package that is missing, or nothing to prune.
    """

    args: ProxSparseConfig
    lower = "`learning_rate` or `lambda_value`"
    proximal: ProximalStep  # once the weights are where they will be trained

    def __init__(
        self, model: PreTrainedModel, args: ProxSparseConfig, *, norms: dict[str, Tensor] | None = None, **kwargs: Any
    ):
        if (args.eval_strategy != "no" or args.eval_on_start) and kwargs.get("eval_dataset") is None:
            asked = f"eval_strategy={getattr(args.eval_strategy, 'value', args.eval_strategy)}"
            raise UsageError(
                f"`{'eval_on_start=True' if args.eval_on_start else asked}` needs samples to evaluate on: give "
                "`eval_samples`, or leave it out."
            )
        self.targets: list[Prunable] = find_prunable(model, args.include, args.exclude, args.wanted.m)
        if args.train_only_pruned:
            pruned = {target.name for target in self.targets}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in pruned)
        if args.permute == "auto":
            with args.main_process_first(local=False):  # the first process writes the order, the others read it
                windows = torch.tensor(kwargs["train_dataset"][: args.norm_samples]["input_ids"])
                stored_order(Path(str(args.output_dir)) / ORDER_FILE, model, windows, args.wanted)
        elif order_of(model) and args.process_index == 0:  # of a pruned checkpoint; extraction needs it
            save_order(order_of(model), Path(str(args.output_dir)) / ORDER_FILE)
        self.norms = norms
        self.objective = Objective(args, self.targets, self._record)
        self._measured = self._scaled = False
        super().__init__(model, args, **kwargs)
        refuse(OF_PROCESSES, self)
        if not self.is_fsdp_enabled:  # sharded weights are there only later, see create_scheduler
            self._measure_original()

    def mask(self) -> Mask:
        """The mask of the weights as they are now. Under FSDP2 every process calls this, and the first gets it."""
        mask = extract_mask(self._learned(), self.targets, self.norms, self.args.wanted)
        mask.base_model = self.model.config._name_or_path
        mask.order = order_of(self.model)
        mask.info = {"method": self.args.method, "lambda1": self.args.lambda_value, "score": self.args.score}
        return mask

    def _learned(self) -> dict[str, Tensor]:
        return {t.name: t.weight.detach() for t in self.targets}

    # Layer-wise steps

    def _pace(self) -> Pace | None:
        """Of the layer-wise step of a micro-batch: its learning rate is that of the run, by a factor."""
        if self.state.global_step >= self.args.layer_steps:
            return None
        assert self.optimizer is not None
        factor = self.args.layer_rate / self.current_gradient_accumulation_steps
        rates = {id(p): group["lr"] * factor for group in self.optimizer.param_groups for p in group["params"]}
        return Pace(rates, self.state.global_step)

    def _teacher(self, model, inputs) -> Tensor:
        # Compiled code does not call the hooks that watch the layers.
        plain = self.args.torch_compile and self.objective.layers
        return super()._teacher(self.model if plain else model, inputs)

    # Evaluation and logging

    def evaluate(self, *args, **kwargs):
        """Evaluate what will be deployed: the original weights under the current mask, where they are at hand."""
        with doing("evaluating on held-out samples"), self.objective.evaluating():
            found = super().evaluate(*args, **kwargs)
        reshard(self.model)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        blocks = self.proximal.progress() if self.model.training and "loss" in logs else {}
        if "prox_seconds" in blocks:
            elapsed, self._step_seconds = self._step_seconds + blocks["prox_seconds"], 0.0
            blocks["prox_share"] = blocks["prox_seconds"] / elapsed if elapsed else 0.0
        super().log(logs | blocks, start_time)
        if "share_24" in blocks:  # not in logs: reporters take no lists
            cast(dict, self.state.log_history[-1])["share_24_by_layer"] = self.proximal.share_by_layer()

    # Optimizer and checkpoints

    def create_optimizer(self, model=None):
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.optim_in_backward:
            step_in_backward(optimizer, self.objective.learned)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # The model is where it will be trained by now, and under FSDP2 no checkpoint has been loaded yet.
        if not self._measured:
            self._measure_original()
        if self.args.relative and not self._scaled:
            assert self.optimizer is not None
            scale_learning_rates(self.optimizer, {id(t.weight): self.proximal.rms[t.name][0] for t in self.targets})
            self._scaled = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _add_to_checkpoint(self, folder: Path) -> None:
        # Shards on the disk are pickled; so that nobody needs to read them, what is extracted from weights is added.
        mask = self.mask() if self.is_fsdp_enabled else None
        zeros = sparsity_by_kind(self._learned(), self.targets, self.args.wanted.m) if mask else None
        super()._add_to_checkpoint(folder)
        if not self.is_world_process_zero():
            return
        if mask:
            save_mask(mask, folder / MASK_FILE)
            write_json(folder / ZEROS_FILE, zeros)
        self.proximal.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        with doing(f"reading the checkpoint {resume_from_checkpoint}"):
            self.proximal.restore(Path(resume_from_checkpoint))

    # Set-up

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            # Else whole gradients stay in every process until the last micro-batch.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def _measure_original(self) -> None:
        """What is taken from the weights while they are the original ones: W0, input norms and scales."""
        args, self._measured = self.args, True
        for target in self.targets:
            if any(place.is_shard(target.in_dim) for place in getattr(target.weight, "placements", ())):
                raise UsageError(
                    f"{target.name} is sharded along its inputs, which cuts through blocks of four: FSDP splits the "
                    "first dimension, and this layer (Conv1D, as in GPT-2) has its inputs there. Learn it with DDP."
                )
        if args.score == "activation" and self.norms is None:
            self.norms = self._measure_norms()
        if self.norms is not None:
            # Where they are used, once and for all.
            parts = ((t, matching_part(self.norms[t.name], t.weight)) for t in self.targets)
            self.norms = {t.name: part.to(t.stored.device, torch.float32) for t, part in parts}
        self.proximal = ProximalStep(self.targets, args, self.norms)
        layers = None
        if args.layer_rate:
            layers = LayerSteps(self.model, self.targets, args, self._pace, self.accelerator.autocast)
        self.objective.begin(self.model, self.norms, self.proximal.rms if args.relative else {}, layers)
        if args.distill and not self.is_fsdp_enabled and self.targets[0].stored.device.type != "cpu":
            self.objective.head = plain_head(self.model)
        self.add_callback(ProxCallback(self.proximal))
        self.proximal.warm_up()

    def _measure_norms(self) -> dict[str, Tensor]:
        windows = torch.tensor(cast(Any, self.train_dataset)[: self.args.norm_samples]["input_ids"])
        path = Path(str(self.args.output_dir)) / NORMS_FILE
        norms = stored_norms(path, self.model, self.targets, windows, first=self.is_world_process_zero())
        if self.args.world_size == 1:
            return norms
        # Of one process for all: unequal devices sum in unequal orders, and replicas would part.
        norms = {name: norm.to(self.accelerator.device) for name, norm in norms.items()}
        return {name: norm.cpu() for name, norm in broadcast(norms).items()}
