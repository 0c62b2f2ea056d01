"""Learn a mask, in one function.

    mask = learn_mask(model, tokenizer, windows)
    apply_mask(model, mask)

``learn`` does the work. The command line calls it with the folder of a run.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import UsageError, settings_at_fault
from proxsparse.learning.checks import check_inputs
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.folder import WINDOWS, Run, described
from proxsparse.learning.progress import show_progress
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.mask import Mask, load_mask
from proxsparse.model.hub_errors import quiet_bars
from proxsparse.model.inputs import digest, weight_sum
from proxsparse.model.loading import native_bf16
from proxsparse.model.restoring import restored
from proxsparse.record import write_json
from proxsparse.resume import first_alone_in, starting_point

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What a run ends with.

    Attributes:
        mask: the mask that was learned; under FSDP2 the first process has it, the others an empty one.
        history: the Trainer's log, with one entry per logging step.
    """

    mask: Mask
    history: list[dict[str, Any]]


def learn_mask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    method: str = "masked",
    output_dir: Path | str | None = None,
    *,
    eval_windows: Tensor | None = None,
    **settings: Any,
) -> Mask:
    """Learn which two of every four weights a model keeps (or N of every M); the model itself stays as it was.

    Args:
        model: the pretrained model, float32 or bfloat16, on the device to compute on.
        tokenizer: tokenizer of the model.
        windows: (N, T) calibration token ids, of ``proxsparse.calibration_windows`` or your own; each is seen once.
        method: 'masked' (this project's) or 'paper'.
        output_dir: folder of the run, for its mask, history and checkpoints. The same call again goes on from the last
            checkpoint, or reads the mask of a run that is done. None: nothing is written.
        eval_windows: (M, T) held-out token ids for the evaluation loss.
        settings: fields of ``ProxSparseConfig``, such as ``pattern="4:8"``.

    Returns:
        The mask, 2:4 or of the ``pattern`` given, by names of ``model.named_parameters()``.

    Raises:
        UsageError: a setting is wrong, or the folder holds another run.
        RunError: the run diverged.

    Source: arXiv 2502.00258; what 'masked' does differently is in docs/method.md.
    """
    check_inputs(model, tokenizer, windows, eval_windows)
    if torch.cuda.device_count() > 1 and "RANK" not in os.environ and model.device.type == "cuda":
        raise UsageError(
            "Learning uses one GPU per process: choose one with CUDA_VISIBLE_DEVICES, or start the program with "
            "accelerate launch."
        )
    with tempfile.TemporaryDirectory() as scratch:
        kept_nowhere: dict[str, Any] = {} if output_dir else {"save_strategy": "no"}
        defaults = defaults_on(model.device.type) | kept_nowhere | {"output_dir": str(output_dir or scratch)}
        with settings_at_fault():
            config = ProxSparseConfig(**(defaults | settings), method=method, max_length=windows.shape[1])
        if is_sharded(config):
            raise UsageError(
                "learn_mask gives the model back as it was, which FSDP's shards can't be: use ProxSparseTrainer, "
                "or end-to-end/main.py."
            )
        model_name, batch_size = str(model.config._name_or_path), config.per_device_train_batch_size
        data: dict[str, Any] = {"model": model_name, "dataset": WINDOWS, "weights": weight_sum(model)}
        data |= {"samples": len(windows), "ctx_len": windows.shape[1], "batch_size": batch_size}
        run = Run(str(config.output_dir))
        settled = described(data | {"text": digest(windows)}, config)
        run.refuse_another(settled)
        if run.is_finished:
            return load_mask(run.mask_file)
        with restored(model):
            return learn(model, tokenizer, windows, config, data, eval_windows=eval_windows).mask


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    config: ProxSparseConfig,
    data: dict[str, Any],
    *,
    eval_windows: Tensor | None = None,
) -> Outcome:
    """Learn in the folder of a run, from its last complete checkpoint where it has one, and write what was learned.

    Args:
        windows, eval_windows: (N, T) token ids.
        config: settings of the run; its output_dir is the run's folder.
        data: what the run learns from, for its record: model, dataset, samples, ctx_len and the like.

    Returns:
        The mask and the log; the model holds the learned weights.

    Raises:
        UsageError, RunError: see ``learn_mask``.
    """
    run = Run(str(config.output_dir))
    settings = described(data | {"text": digest(windows)}, config)
    run.refuse_another(settings)
    disable_progress_bars()  # three bars of tokenising for windows that are tokens already
    config.max_length = windows.shape[1]
    trainer = ProxSparseTrainer(
        model,
        config,
        train_dataset=_dataset(windows),
        eval_dataset=None if eval_windows is None else _dataset(eval_windows),
        processing_class=tokenizer,
    )
    first = int(os.environ.get("RANK", "0")) == 0
    checkpoint = starting_point(run.folder, config.resume_from_checkpoint)
    if first:  # only now, so that a mistake leaves no folder behind that refuses the right one
        run.claim(settings)
    show_progress(trainer)
    if checkpoint and first:
        logger.info("going on from %s", checkpoint)
    if config.save_only_model and first:
        logger.warning("checkpoints without the optimizer's state: this run, once stopped, begins again")
    with quiet_bars(), first_alone_in(run.folder):
        trainer.train(resume_from_checkpoint=checkpoint)
        mask = trainer.mask()
        if first:
            run.save(mask)
            write_json(run.history_file, trainer.state.log_history)
    return Outcome(mask, trainer.state.log_history)


def is_sharded(config: ProxSparseConfig) -> bool:
    """Whether FSDP will cut the model into shards, as the configuration or accelerate launch says."""
    return bool(config.fsdp_plugin_args) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def defaults_on(device: str) -> dict[str, Any]:
    """Defaults for a kind of device. Those of the Trainer assume a GPU with bfloat16, as all since Ampere have."""
    if device != "cpu":
        return {} if native_bf16(device) else {"bf16": False}
    return {"use_cpu": True, "activation_checkpointing": False, "bf16": native_bf16("cpu")}


def _dataset(windows: Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": windows.tolist()})
