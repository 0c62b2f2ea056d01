"""LoRA adapters of pruned models: trained under the mask, and merged so that the model stays pruned.

A plain adapter adds B A * scale to a weight, which has no zeros: merged, it makes a pruned model dense again. Here
mask * (B A) * scale is added, while the adapter trains (``masked_lora``) and when it is merged (``merge_lora``). The
adapter's files are those of peft.

Shapes: O = out_features, I = in_features, R = rank. A is (R, I) and B is (O, R).
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from proxsparse.errors import RunError, UsageError, doing
from proxsparse.mask import Mask, apply_mask
from proxsparse.model.channels import recall_order
from proxsparse.model.hub_errors import ADAPTER, clear_errors, installed
from proxsparse.model.prunable import Prunable
from proxsparse.record import read_json

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the names of modules in an adapter's file
BESIDE = (True, False, "gaussian", "orthogonal", "eva")  # initialisations that leave the model's own weights alone


def masked_lora(
    model: PreTrainedModel, mask: Mask, adapter: "LoraConfig | str | Path", *, revision: str | None = None
) -> "PeftModel":
    """Put a LoRA adapter on a model that adds mask * (B A) * scale, so that nothing is lost when it is merged.

    Args:
        model: the model that the mask was made for. It is pruned, if it is not; its weights stay frozen.
        mask: the mask. ``proxsparse.mask_of_pruned`` takes it from the zeros of a pruned model.
        adapter: peft's ``LoraConfig`` for a new adapter; or the folder or Hub id of one to train on.
        revision: revision of an adapter on the Hub.

    Returns:
        peft's model, for any Trainer or loop. ``save_pretrained`` writes the adapter, and ``merge_and_unload`` gives
        the pruned model with the adapter in its kept weights.

    Raises:
        UsageError: the mask or the adapter does not fit the model, or the adapter is of a form without a mask.
        RunError: peft is not installed, or the adapter's files are damaged.
    """
    if not installed("peft"):
        raise RunError("Adapters need the package peft: pip install 'peft>=0.21', the extra [lora] of proxsparse.")
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    folder = None
    if isinstance(adapter, (str, Path)):
        folder = adapter_folder(adapter, revision)
        with doing(f"reading the adapter {adapter}"):
            config: Any = PeftConfig.from_pretrained(str(folder))
        _refuse_other_models(folder, str(adapter), model)
    else:
        config = adapter
    if not isinstance(config, LoraConfig):
        raise UsageError(f"`adapter` must be a LoRA adapter of peft; got {type(config).__name__}.", "adapter")
    _refuse_other_forms(config)
    if hasattr(model, "peft_config"):
        raise UsageError("The model has adapters already: give the model without them.", "model")
    ends = _tied_ends(model)
    recall_order(model)
    targets = apply_mask(model, mask)
    with doing("adding the adapter to the model"):
        if folder is None:
            found: Any = get_peft_model(model, config)
        else:
            found = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    _mask_adapters(found, mask, targets, ends)
    return found


def merge_lora(
    model: PreTrainedModel, adapter: str | Path, mask: Mask, *, revision: str | None = None
) -> PreTrainedModel:
    """Merge a LoRA adapter into a pruned model, in place: W + mask * (B A) * scale.

    Of an adapter that was trained with ``masked_lora`` nothing is lost. Of one that was trained on the pruned model
    without a mask, the part at the zeros is left out.

    Args:
        model: the model that the adapter was trained on. It is pruned, if it is not.
        adapter: folder or Hub id of the adapter.
        mask: the mask.
        revision: revision of an adapter on the Hub.

    Returns:
        The model, with zeros where they were.

    Raises:
        UsageError: the mask or the adapter does not fit the model, or the adapter is of a form without a mask.
        RunError: peft is not installed, or the adapter is damaged.
    """
    wrapped: Any = masked_lora(model, mask, adapter, revision=revision)
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RunError(f"The adapter {adapter} can't be merged: {error}") from error
    merged.requires_grad_(True)
    return merged


def adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter: on this machine, or downloaded from the Hub.

    Raises:
        UsageError: it is no adapter, or its weights are no safetensors file.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        name = str(adapter)
        if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise UsageError(f"There is no folder {name}; give the folder or the Hub id of an adapter.", "adapter")
        with doing(f"downloading the adapter {name}"), clear_errors(name, "adapter"):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[ADAPTER, WEIGHTS]))
    for file in (ADAPTER, WEIGHTS):
        if not (folder / file).is_file():
            raise UsageError(
                f"{adapter} has no {file}, so it is not an adapter that peft saved as safetensors.", "adapter"
            )
    return folder


def _refuse_other_models(folder: Path, adapter: str, model: PreTrainedModel) -> None:
    """Refuse an adapter whose layers are not those of the model: peft would leave out what it does not find."""
    modules = dict(model.named_modules())
    try:
        made_for = read_json(folder / ADAPTER).get("base_model_name_or_path") or "an unnamed model"
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, AttributeError) as error:
        raise RunError(f"The adapter {adapter} is damaged ({error}); get it again.") from error
    refusal = f"The adapter {adapter} was made for {made_for} and does not fit {model.config._name_or_path or 'it'}: "
    found = 0
    for key, shape in shapes.items():
        path, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        found += 1
        if path not in modules:
            raise UsageError(f"{refusal}the model has no {path}.", "adapter")
        weight = getattr(modules[path], "weight", None)
        if not isinstance(modules[path], torch.nn.Linear | Conv1D) or weight is None:
            continue
        outputs, inputs = reversed(weight.shape) if isinstance(modules[path], Conv1D) else weight.shape
        wanted, given = (inputs, shape[1]) if part.startswith("A") else (outputs, shape[0])
        if wanted != given:
            side = "inputs" if part.startswith("A") else "outputs"
            raise UsageError(f"{refusal}{path} has {given} {side} in the adapter and {wanted} in the model.", "adapter")
    if not found:
        raise UsageError(f"The adapter {adapter} has no LoRA weights in {WEIGHTS}.", "adapter")


def _refuse_other_forms(config: "LoraConfig") -> None:
    """Refuse what changes the model's own weights, or is more than a product B A."""
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    used = [name for name in (*variants, "target_parameters") if getattr(config, name, None)]
    if used:
        raise UsageError(f"An adapter with {used[0]} can't be masked: use plain LoRA, without it.", "adapter")
    if config.init_lora_weights not in BESIDE:
        raise UsageError(
            f"init_lora_weights={config.init_lora_weights!r} changes the model's own weights, which would not stay "
            f"pruned: use one of {', '.join(map(repr, BESIDE))}.",
            "adapter",
        )


def _tied_ends(model: PreTrainedModel) -> set[int]:
    """Identities of the embedding and the LM head, where they share their weight."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    tied = len({id(getattr(end, "weight", None)) for end in ends}) < len(ends)
    return {id(end) for end in ends} if tied else set()


def _mask_adapters(wrapped: Any, mask: Mask, targets: list[Prunable], ends: set[int]) -> None:
    """Mask the adapters on pruned weights; those on other weights stay as they are.

    Args:
        ends: modules that share one weight, which a merge would change for all of them.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer

    from proxsparse.deploy.masked_adapter import MaskedAdapter

    of_module = {id(target.module): target for target in targets}
    for path, module in wrapped.named_modules():
        original = getattr(module, "original_module", None)
        if original is not None and any(id(part) in of_module for part in original.modules()):
            raise UsageError(f"modules_to_save trains all of {path}, which is pruned: leave it out.", "adapter")
        touched = original if original is not None else getattr(module, "base_layer", None)
        if id(touched) in ends:
            raise UsageError(
                f"The adapter trains {path}, whose weight the embedding and the LM head share: leave both out.",
                "adapter",
            )
        if not isinstance(module, LoraLayer):
            continue
        target = of_module.get(id(module.get_base_layer()))
        if target is None:
            continue
        if type(module) is not Linear or module.lora_variant:
            raise UsageError(
                f"The adapter on {target.name} is of a form that can't be masked: use plain LoRA.", "adapter"
            )
        kept = mask.tensors[target.name].movedim(-1, target.in_dim).to(target.weight.device)
        for name in module.lora_A:
            module.lora_variant[name] = MaskedAdapter(kept)
