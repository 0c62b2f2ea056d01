"""The learning loop: TRL's SFTTrainer with the proximal step after every optimizer step.

    trainer = ProxSparseTrainer(model, ProxSparseConfig(output_dir="runs/mine"), train_dataset=windows, ...)
    trainer.train()
    mask = trainer.mask()

Three things are added, none by copying the Trainer: a callback applies the operator after each real optimizer step;
in ``training_step`` the objective puts the weights in place with which the loss is computed; ``compute_loss`` asks it
for the loss.
"""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTTrainer

from proxsparse.errors import RunError, UsageError, doing
from proxsparse.learning.checks import require_packages, settings_at_fault
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.folder import ZEROS_FILE
from proxsparse.learning.head import last_states, plain_head
from proxsparse.learning.objective import Objective, Share
from proxsparse.learning.optim import own_optimizer, scale_learning_rates, step_in_backward
from proxsparse.learning.processes import REFUSALS as OF_PROCESSES
from proxsparse.learning.proximal import ProxCallback, ProximalStep
from proxsparse.learning.refusals import refuse
from proxsparse.mask import MASK_FILE, Mask, extract_mask, save_mask, sparsity_by_kind
from proxsparse.model.channels import ORDER_FILE, order_of, save_order
from proxsparse.model.inputs import NORMS_FILE, digest, stored_norms
from proxsparse.model.loading import load_model
from proxsparse.model.ordering import stored_order
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.model.sharding import matching_part, reshard
from proxsparse.model.trainable import clean_generation_config, window_collator
from proxsparse.record import read_json, write_json
from proxsparse.resume import complete_checkpoints, resume_hint

logger = logging.getLogger(__name__)
TEXT_FILE = "text.json"  # in checkpoints: of the windows that were learned from
OF_THE_TRAINER = ("labels", "use_cache", "output_router_logits")  # inputs that a plain forward pass goes without


class ProxSparseTrainer(SFTTrainer):
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
    model: PreTrainedModel
    objective: Objective
    proximal: ProximalStep  # once the weights are where they will be trained

    def __init__(
        self, model: PreTrainedModel, args: ProxSparseConfig, *, norms: dict[str, Tensor] | None = None, **kwargs: Any
    ):
        require_packages(args)
        if args.eval_strategy != "no" and kwargs.get("eval_dataset") is None:
            raise UsageError(
                f"`eval_strategy={getattr(args.eval_strategy, 'value', args.eval_strategy)}` needs samples to evaluate "
                "on: give `eval_samples`, or leave it out."
            )
        self.targets: list[Prunable] = find_prunable(model, args.include, args.exclude, args.wanted.m)
        if args.train_only_pruned:
            pruned = {target.name for target in self.targets}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in pruned)
        clean_generation_config(model)
        if kwargs.get("data_collator") is None and kwargs.get("processing_class") is not None:
            kwargs["data_collator"] = window_collator(kwargs["processing_class"])
        if args.permute == "auto":
            with args.main_process_first(local=False):  # the first process writes the order, the others read it
                windows = torch.tensor(kwargs["train_dataset"][: args.norm_samples]["input_ids"])
                stored_order(Path(str(args.output_dir)) / ORDER_FILE, model, windows, args.wanted)
        elif order_of(model) and args.process_index == 0:  # of a pruned checkpoint; extraction needs it
            save_order(order_of(model), Path(str(args.output_dir)) / ORDER_FILE)
        self.norms = norms
        self.objective = Objective(args, self.targets, self._record)
        self._measured = self._scaled = self._inputs_need_grad = False
        self._step_seconds = 0.0
        self._fused_head = True  # TRL's, which makes no logits; not every architecture goes with it
        with settings_at_fault():
            super().__init__(model, args, **kwargs)
        refuse(OF_PROCESSES, self)
        if not self.is_fsdp_enabled:  # sharded weights are there only later, see create_scheduler
            self._measure_original()
        complete_checkpoints(self, self._add_to_checkpoint)

    def mask(self) -> Mask:
        """The mask of the weights as they are now. Under FSDP2 every process calls this, and the first gets it."""
        mask = extract_mask(self._learned(), self.targets, self.norms, self.args.wanted)
        mask.base_model = self.model.config._name_or_path
        mask.order = order_of(self.model)
        mask.info = {"method": self.args.method, "lambda1": self.args.lambda_value, "score": self.args.score}
        return mask

    def _learned(self) -> dict[str, Tensor]:
        return {t.name: t.weight.detach() for t in self.targets}

    # The loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        start, step = time.perf_counter(), self.state.global_step + 1
        with doing(f"step {step} of learning"):
            with self.objective.computing(lambda: self._teacher(model, inputs)):
                loss = super().training_step(model, inputs, num_items_in_batch)
            self._step_seconds += time.perf_counter() - start
            if not loss.isfinite():
                raise RunError(
                    f"The loss is {loss.item()} at step {step}. "
                    f"Lower `learning_rate` or `lambda_value`. {resume_hint(str(self.args.output_dir))}"
                )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        share = self._share(num_items_in_batch)
        if self.objective.teacher is None and self._fused_head:
            try:
                out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                self._leave_fused_head(error)
                return self.compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = out if return_outputs else (out, None)
            if self.model.training:
                # With num_items_in_batch it is this micro-batch's share of the whole batch's mean.
                self._record("lm_loss", loss * share.steps)
        else:
            head = self.objective.head if self.objective.teacher is not None else None
            outputs = self._outputs(model, inputs, head)
            # The head in pieces is outside of the model's forward pass, which accelerate puts under autocast.
            lower = self.accelerator.autocast() if head is not None and self.args.bf16 else contextlib.nullcontext()
            with lower:
                loss = self.objective.loss(outputs if head else outputs.logits, inputs["labels"], share)
        if self.model.training:
            if not loss.requires_grad and torch.is_grad_enabled() and not self._inputs_need_grad:
                self._inputs_need_grad = True
                model.enable_input_require_grads()  # Reformer's reversible layers see no weights, only their inputs
                return self.compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = loss + self.objective.penalty(share, self.args.device)
        return (loss, outputs) if return_outputs else loss

    def _share(self, num_items_in_batch) -> Share:
        if num_items_in_batch is None:
            return Share()
        # With num_items_in_batch the Trainer leaves the division by the accumulation steps to the loss.
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return Share(num_items_in_batch, steps, processes)

    def _leave_fused_head(self, error: Exception) -> None:
        """Compute the language-model loss from logits from here on; the routers' own loss is left out."""
        logger.info(
            "TRL's fused loss does not work with a %s (%s): the loss is computed from logits, which takes more memory, "
            "and without the routers' own loss",
            type(self.model).__name__, error,
        )  # fmt: skip
        self._fused_head = self.aux_loss_enabled = False
        config: Any = self.model.config.get_text_config()
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False

    @torch.no_grad()
    def _teacher(self, model, inputs) -> Tensor:
        """Logits (B, T, V) or last hidden states (B, T, H) of the weights as they are for the same batch."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            model.eval()
            outputs = self._outputs(model, inputs, self.objective.head)
            model.train()
        return outputs if self.objective.head else outputs.logits

    def _outputs(self, model, inputs, head):
        """Of a plain forward pass; last hidden states where there is a head that makes the logits of them."""
        inputs = {k: v for k, v in inputs.items() if k not in OF_THE_TRAINER}
        return last_states(self.model, model, **inputs) if head else model(**inputs, use_cache=False)

    def _record(self, name: str, value: Tensor) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value.detach().item())

    # Evaluation and logging

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's would call the run a fine-tuned model. The product is a mask; exports have a card of their own."""

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
        if self.optimizer is None:
            own = own_optimizer(self.args, self.model)
            if own is not None:
                self.optimizer_cls_and_kwargs = own
            optimizer = super().create_optimizer(model)
            if self.args.optim_in_backward:
                step_in_backward(optimizer, self.objective.learned)
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
        zeros = sparsity_by_kind(self._learned(), self.targets, self.args.wanted.m) if mask else None
        if not self.is_world_process_zero():
            return
        if mask:
            save_mask(mask, folder / MASK_FILE)
            write_json(folder / ZEROS_FILE, zeros)
        write_json(folder / TEXT_FILE, {"sha256": self._text()})
        self.proximal.save(folder)

    def _text(self) -> str:
        """Digest of the windows that are learned from."""
        windows = torch.tensor(cast(Any, self.train_dataset)["input_ids"][:])
        return digest(windows)

    def _save_checkpoint(self, model, trial):
        with doing(f"saving the checkpoint of step {self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        with doing(f"reading the checkpoint {folder}"):
            if (folder / TEXT_FILE).is_file() and read_json(folder / TEXT_FILE)["sha256"] != self._text():
                raise UsageError(
                    f"{folder} was learned from another text than the one given now: give the same text, or another "
                    "`output_dir`."
                )
            self._load_weights(folder, model)
            self.proximal.restore(folder)

    def _load_best_model(self) -> None:
        logger.info("taking the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_weights(Path(str(self.state.best_model_checkpoint)))

    def _load_weights(self, folder: Path, model=None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(str(folder), model)
            return
        # Through from_pretrained, which undoes the renaming that stacked experts undergo when they are saved.
        stored = load_model(str(folder), dtype=self.model.dtype, trust_remote_code=self.args.trust_remote_code)
        self.model.load_state_dict(stored.state_dict())

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
        self.objective.begin(self.model, self.norms, self.proximal.rms if args.relative else {})
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
