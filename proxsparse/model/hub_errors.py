"""What transformers and the Hub's client print and raise while a model is loaded, in one sentence or not at all."""

import logging
import os

from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers.utils import logging as hf_logging

from proxsparse.errors import RunError, UsageError
from proxsparse.model.embedded import EMBEDDED

try:  # the Hub's client brings the one or the other, by its version
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

UNREACHABLE = (httpx.HTTPError,)  # what it raises where it gets no answer; this is no OSError


class quiet_bars:
    """Hide transformers' loading bars, which flood logs; loading takes seconds."""

    def __enter__(self) -> None:
        self.shown = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()

    def __exit__(self, *_) -> None:
        if self.shown:
            hf_logging.enable_progress_bar()


class clear_errors:
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
                f"{name!r} is neither a folder here nor a Hub id of the form organisation/name.", "model"
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
                f"Give a folder, or `model={EMBEDDED}`, which comes with script/setup.sh."
            ) from chain[0]
        if "trust_remote_code" in text:
            raise RunError(
                f"The model {name} needs its own code: read it, then pass `trust_remote_code=True`."
            ) from chain[0]
        if (
            isinstance(chain[0], (OSError, ValueError, KeyError, RuntimeError))
            or "Safetensor" in type(chain[0]).__name__
        ):
            first = str(chain[0]).strip().splitlines()[0] if str(chain[0]).strip() else type(chain[0]).__name__
            raise RunError(f"The model {name} can't be loaded: {first}") from chain[0]
