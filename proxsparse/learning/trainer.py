"""The learning loop: TRL's SFTTrainer with the proximal step after every optimizer step.

    trainer = ProxSparseTrainer(model, ProxSparseConfig(output_dir="runs/mine"), train_dataset=windows, ...)
    trainer.train()
    mask = trainer.mask()

Three things are added, none by copying the Trainer: a callback applies the operator after each real optimizer step;
``training_step`` puts the masked original weights in place for the forward and backward pass (method 'masked');
``compute_loss`` adds the frozen-weight regulariser or distils from the dense model.
"""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from trl import SFTTrainer

from proxsparse.errors import RunError, UsageError
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.losses import distillation_loss, frozen_weight_penalty, lm_loss
from proxsparse.learning.optim import own_optimizer, scale_learning_rates, step_in_backward
from proxsparse.learning.original import OriginalWeights
from proxsparse.learning.proximal import ProxCallback, ProximalStep
from proxsparse.learning.swaps import WeightSwaps
from proxsparse.mask import MASK_FILE, Mask, extract_mask, save_mask, sparsity_by_kind
from proxsparse.model.inputs import NORMS_FILE, stored_norms
from proxsparse.model.loading import load_model
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.model.sharding import local, matching_part, reshard
from proxsparse.operator.prox import kernel_for, prox_op_
from proxsparse.record import write_json
from proxsparse.resume import complete_checkpoints, resume_hint

logger = logging.getLogger(__name__)
ZEROS_FILE = "zeros.json"  # with the mask, in checkpoints of sharded runs


class ProxSparseTrainer(SFTTrainer):
    """SFTTrainer that learns a 2:4 mask.

    Args:
        model: the pretrained model; its weights at this moment are the original weights W0.
        args: ProxSparseConfig.
        norms: name -> (I,) input norms, or None to measure them on the first training windows.
        kwargs: of SFTTrainer; ``train_dataset`` has a column ``input_ids`` of windows of equal length.

    Raises:
        UsageError: settings that exclude each other, or nothing to prune.
    """

    args: ProxSparseConfig
    model: PreTrainedModel
    proximal: ProximalStep  # once the weights are where they will be trained

    def __init__(
        self, model: PreTrainedModel, args: ProxSparseConfig, *, norms: dict[str, Tensor] | None = None, **kwargs: Any
    ):
        self.targets: list[Prunable] = find_prunable(model, args.include, args.exclude)
        if args.train_only_pruned:
            pruned = {target.name for target in self.targets}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in pruned)
        self.norms = norms
        self.swaps: WeightSwaps | None = None
        self.original: OriginalWeights | None = None
        self._measured = self._scaled = False
        self._step_seconds = 0.0
        self._teacher_logits: Tensor | None = None
        super().__init__(model, args, **kwargs)
        self._refuse_unsupported()
        if not self.is_fsdp_enabled:  # sharded weights are there only later, see create_scheduler
            self._measure_original()
        complete_checkpoints(self, self._add_to_checkpoint)

    def mask(self) -> Mask:
        """The mask of the weights as they are now. Under FSDP2 every process calls this, and the first gets it."""
        mask = extract_mask({t.name: t.weight.detach() for t in self.targets}, self.targets, self.norms)
        mask.base_model = self.model.config._name_or_path
        mask.info = {"method": self.args.method, "lambda1": self.args.lambda_value, "score": self.args.score}
        return mask

    # The loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        start = time.perf_counter()
        with self.swaps.away() if self.swaps else contextlib.nullcontext():
            if self.swaps and self.args.distill:
                self.swaps.put_original()
                self._teacher_logits = self._logits(model, inputs)
            if self.swaps:
                (self.swaps.put_masked if self.args.masked_forward else self.swaps.put_learned)()
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._teacher_logits = None
        self._step_seconds += time.perf_counter() - start
        if not loss.isfinite():
            raise RunError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. "
                f"Lower `learning_rate` or `lambda_value`. {resume_hint(str(self.args.output_dir))}"
            )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training or self._teacher_logits is None:
            out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = out[0] if return_outputs else out
            if self.model.training:
                # With num_items_in_batch it is this micro-batch's share of the whole batch's mean.
                steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                self._record("lm_loss", loss * steps)
                loss = loss + self._frozen_weight_term(num_items_in_batch)
            return (loss, out[1]) if return_outputs else loss
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        teacher, self._teacher_logits = self._teacher_logits, None  # not kept through the backward pass
        kept = targets != -100
        tokens = kept.sum()
        if tokens < len(targets):  # else selecting them would only copy the logits, which are large
            logits, teacher, targets = logits[kept], teacher[kept], targets[kept]
        distilled = distillation_loss(logits, teacher, self.args.temperature)
        lm_counts = self.args.distill < 1  # else it is logged only
        lm = cross_entropy(logits.float(), targets, reduction="sum") if lm_counts else lm_loss(logits, targets)
        self._record("kl", distilled / tokens)
        self._record("lm_loss", lm / tokens)
        loss = self.args.distill * distilled + ((1 - self.args.distill) * lm if lm_counts else 0.0)
        # As in SFTTrainer: num_items_in_batch counts the tokens of all micro-batches and ranks.
        loss = loss / (tokens if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        loss = loss + self._frozen_weight_term(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _frozen_weight_term(self, num_items_in_batch) -> Tensor | float:
        if not self.args.project_lambda2:
            return 0.0
        assert self.original is not None
        penalty = torch.zeros((), device=self.args.device)
        for target in self.targets:
            # Of a shard, its rows: gradients of rows elsewhere are made where they are.
            base = self.original.of(target)
            penalty = penalty + frozen_weight_penalty(local(target.weight), base, self.args.epsilon)
        term = self.args.lambda2_value * penalty
        self._record("lambda2_loss", self.proximal.total(term.detach()))
        # With num_items_in_batch the Trainer leaves the division by the accumulation steps to the loss.
        return term / (self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1)

    @torch.no_grad()
    def _logits(self, model, inputs) -> Tensor:
        """Logits of the weights as they are for the same batch, on (B * (T - 1), V)."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            model.eval()
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
            model.train()
        return logits[:, :-1].flatten(0, 1)

    # Evaluation, logging, checkpoints

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's would call the run a fine-tuned model. The product is a mask; exports have a card of their own."""

    def evaluate(self, *args, **kwargs):
        """Evaluate what will be deployed: the original weights under the current mask, where they are at hand."""
        masked = self.swaps if self.args.masked_forward else None
        with masked.away() if masked else contextlib.nullcontext():
            if masked:
                masked.put_masked()
            found = super().evaluate(*args, **kwargs)
        reshard(self.model)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs and (blocks := self.proximal.progress()):
            elapsed, self._step_seconds = self._step_seconds + blocks["prox_seconds"], 0.0
            logs |= blocks | {"prox_share": blocks["prox_seconds"] / elapsed if elapsed else 0.0}
            super().log(logs, start_time)
            entry: dict = self.state.log_history[-1]
            entry["share_24_by_layer"] = self.proximal.share_by_layer()  # not in logs: reporters take no lists
        else:
            super().log(logs, start_time)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            own = own_optimizer(self.args, self.model)
            if own is not None:
                self.optimizer_cls_and_kwargs = own
            optimizer = super().create_optimizer(model)
            if self.args.optim_in_backward:
                step_in_backward(optimizer, self._learned)
        return self.optimizer

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
        zeros = sparsity_by_kind({t.name: t.weight.detach() for t in self.targets}, self.targets) if mask else None
        if not self.is_world_process_zero():
            return
        if mask:
            save_mask(mask, folder / MASK_FILE)
            write_json(folder / ZEROS_FILE, zeros)
        self.proximal.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            # Through from_pretrained, which undoes the renaming that stacked experts undergo when they are saved.
            trusted = self.args.trust_remote_code
            stored = load_model(str(resume_from_checkpoint), dtype=self.model.dtype, trust_remote_code=trusted)
            self.model.load_state_dict(stored.state_dict())
        self.proximal.restore(Path(resume_from_checkpoint))

    def _learned(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager:
        """Inside, a parameter holds what it learns, not what the forward pass saw."""
        return self.swaps.learned(parameter) if self.swaps else contextlib.nullcontext()

    def _record(self, name: str, value: Tensor) -> None:
        self._metrics["train"][name].append(value.detach().item())

    # Set-up

    def _refuse_unsupported(self) -> None:
        args = self.args
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if self.is_deepspeed_enabled:
            raise UsageError(
                "Learning under DeepSpeed is not supported: ZeRO keeps weights in flat pieces that cut through blocks "
                "of four. Use FSDP2, as script/accelerate/fsdp2.yaml sets it up."
            )
        if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
            raise UsageError(
                "FSDP1 flattens weights, so that rows are cut through; set fsdp_version: 2, as in "
                "script/accelerate/fsdp2.yaml."
            )
        if self.is_fsdp_enabled and args.keep_base == "checkpoint":
            raise UsageError("`keep_base=checkpoint` reads whole weights; under FSDP use device or cpu.")
        if args.optim_in_backward and (args.world_size > 1 or self.is_fsdp_enabled):
            raise UsageError(
                "`optim_in_backward` steps before gradients of several processes are averaged; use one process, and no "
                "FSDP."
            )
        if plugin is not None and args.project_lambda2 and not plugin.reshard_after_forward:
            raise UsageError(
                "`project_lambda2=1` needs the shards while the loss is computed: set fsdp_reshard_after_forward: true."
            )

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
            windows = torch.tensor(cast(Any, self.train_dataset)[: args.norm_samples]["input_ids"])
            path = Path(str(args.output_dir)) / NORMS_FILE
            self.norms = stored_norms(path, self.model, self.targets, windows, first=self.is_world_process_zero())
        if self.norms is not None:
            self.norms = {t.name: matching_part(self.norms[t.name], t.weight) for t in self.targets}
        swaps = args.masked_forward or args.distill
        if swaps or args.project_lambda2:
            config = self.model.config
            source = (config._name_or_path, getattr(config, "_commit_hash", None))
            self.original = OriginalWeights(self.targets, args.keep_base, *source)
        if swaps:
            assert self.original is not None
            self.swaps = WeightSwaps(self.model, self.targets, self.original, self.norms, args.offload_learned)
        self.proximal = ProximalStep(self.targets, args, self.norms)
        self.add_callback(ProxCallback(self.proximal))
        weight = self.targets[0].stored
        prox_op_(torch.ones(4, dtype=weight.dtype, device=weight.device), 1.0)  # compile now, not in the first step
        logger.info("proximal operator: kernel '%s', %d weights", kernel_for(weight), len(self.targets))
