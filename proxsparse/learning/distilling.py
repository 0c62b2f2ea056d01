"""What learning a mask and recovering weights have in common: TRL's SFTTrainer, with distillation from the dense model.

The objective says which weights the model holds while it computes, and what the loss is. Checkpoints count when they
are complete, and a run goes on only with the text that it began with.
"""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTTrainer

from proxsparse.errors import RunError, UsageError, doing, settings_at_fault
from proxsparse.learning.checks import require_packages
from proxsparse.learning.head import last_states
from proxsparse.learning.objective import Objective, Share
from proxsparse.learning.optim import own_optimizer
from proxsparse.model.inputs import digest
from proxsparse.model.loading import load_model
from proxsparse.model.trainable import clean_generation_config, window_collator
from proxsparse.record import read_json, write_json
from proxsparse.resume import complete_checkpoints, resume_hint

logger = logging.getLogger(__name__)
TEXT_FILE = "text.json"  # in checkpoints: of the windows that were learned from
OF_THE_TRAINER = ("labels", "use_cache", "output_router_logits")  # inputs that a plain forward pass goes without


class DistillingTrainer(SFTTrainer):
    """SFTTrainer whose objective may distil from the dense model.

    Args:
        model: the model that is trained.
        args: ProxSparseConfig or RecoveryConfig.
        objective: the loss, and what the model holds while it is computed.
        kwargs: arguments of SFTTrainer; ``train_dataset`` has a column ``input_ids`` of windows of equal length.

    Raises:
        UsageError: transformers or TRL do not take a setting, or a package is missing.
    """

    args: Any
    model: PreTrainedModel
    objective: Objective
    purpose = "learning"  # in error messages
    lower = "`learning_rate`"  # what may be too high when the loss is not finite

    def __init__(self, model: PreTrainedModel, args: Any, **kwargs: Any):
        require_packages(args)
        clean_generation_config(model)
        if kwargs.get("data_collator") is None and kwargs.get("processing_class") is not None:
            kwargs["data_collator"] = window_collator(kwargs["processing_class"])
        self._inputs_need_grad = False
        self._step_seconds = 0.0
        self._fused_head = True  # TRL's, which makes no logits; not every architecture goes with it
        with settings_at_fault():
            super().__init__(model, args, **kwargs)
        samples: Any = self.train_dataset
        batch = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and hasattr(samples, "__len__") and len(samples) < batch:
            raise UsageError(
                f"`dataloader_drop_last=True` drops all of the {len(samples)} samples, as a batch takes {batch}: leave "
                "it out, or lower `per_device_train_batch_size`."
            )
        complete_checkpoints(self, self._add_to_checkpoint)

    # The loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        start, step = time.perf_counter(), self.state.global_step + 1
        with doing(f"step {step} of {self.purpose}"):
            with self.objective.computing(lambda: self._teacher(model, inputs)):
                loss = super().training_step(model, inputs, num_items_in_batch)
            self._step_seconds += time.perf_counter() - start
            found = {"loss": loss, "error of the layers' outputs": self.objective.layer_error}
            for what, value in found.items():
                if value is not None and not value.isfinite():
                    raise RunError(
                        f"The {what} is {value.item()} at step {step}. "
                        f"Lower {self.lower} in a run of another `output_dir`. {resume_hint(str(self.args.output_dir))}"
                    )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        share, teacher = self._share(num_items_in_batch), self.objective.teacher
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
                self.objective.teacher = teacher
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

    def _outputs(self, model, inputs, head, inner=None):
        """Of a plain forward pass; last hidden states where there is a head that makes the logits of them.

        Args:
            inner: the model without what it is wrapped in; None: the one that is trained.
        """
        inputs = {k: v for k, v in inputs.items() if k not in OF_THE_TRAINER}
        return last_states(inner or self.model, model, **inputs) if head else model(**inputs, use_cache=False)

    def _record(self, name: str, value: Tensor) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value.detach().item())

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's would call the run a fine-tuned model. The product is a mask; exports have a card of their own."""

    # Optimizer and checkpoints

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            own = own_optimizer(self.args, self.model)
            if own is not None:
                self.optimizer_cls_and_kwargs = own
            super().create_optimizer(model)
        return self.optimizer

    def _add_to_checkpoint(self, folder: Path) -> None:
        if self.is_world_process_zero():
            write_json(folder / TEXT_FILE, {"sha256": self._text()})

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
