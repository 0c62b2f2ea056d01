"""What the Hub says of a model before its weights are downloaded."""

import functools
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError
from transformers.utils import cached_file

from proxsparse.model.hub_errors import UNREACHABLE


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A small file of a Hub model, from the cache or downloaded; None: it has none, or the Hub can't be reached."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(name, file, revision=revision, **missing)
    return Path(found) if found else None


@functools.cache
def hub_tensors(name: str, revision: str | None = None) -> tuple[tuple[str, str, str], ...]:
    """File, name and dtype (as safetensors names it) of every tensor of a Hub model, from the heads of its files.

    Nothing where the Hub can't be reached or the model has no safetensors: what loads the model says so.
    """
    try:
        files = HfApi().get_safetensors_metadata(name, revision=revision).files_metadata
    except (NotASafetensorsRepoError, SafetensorsParsingError, HFValidationError, OSError, *UNREACHABLE):
        return ()
    return tuple((file, key, tensor.dtype) for file, head in files.items() for key, tensor in head.tensors.items())
