"""Write a pruned model: the base's own files, streamed shard by shard, in which only the pruned weights change.

The tokenizer and every other small file stay as the base has them, byte for byte (config.json too, unless it has to
name an order of the channels or a quantisation), and every tensor that is not pruned keeps its bits and its dtype. A
model that has no such files (a GGUF, one made in memory) is written anew, and its card says so.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.deploy.card import model_card
from proxsparse.deploy.changes import Changes
from proxsparse.deploy.quantise import Quantiser, check_base, check_quantisation
from proxsparse.deploy.rounding import round_layers
from proxsparse.deploy.runtimes import NOTES_FILE, TORCHAO_FILE, check_runtime, write_runtime
from proxsparse.errors import UsageError, doing
from proxsparse.mask import Mask, fit_mask
from proxsparse.model.channels import (
    NOTE,
    ORDER_FILE,
    check_order,
    order_of,
    put_into_order,
    recall_order,
    save_order,
)
from proxsparse.model.checkpoint import INDEX, Checkpoint
from proxsparse.model.compact import INDEX as COMPACT_INDEX
from proxsparse.model.compact import check_pattern, index_entry, packed, write_index
from proxsparse.model.hub import add_small_files, commit_of, fetch
from proxsparse.model.hub_errors import quiet_bars
from proxsparse.model.layout import Layout
from proxsparse.model.loading import empty_model, load_model, load_tokenizer
from proxsparse.model.prunable import find_prunable
from proxsparse.model.quantised import without_quantisation
from proxsparse.model.source import model_source, name_of
from proxsparse.model.windows import check_windows
from proxsparse.operator.pattern import Pattern
from proxsparse.record import OWN, atomic_path, read_json, refuse_folder, refuse_trained, write_json

FORMS = ("dense", "compact")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5", ".ot", ".onnx", ".npz")
# Lists of weights, the card and what a server is told are not copied but written.
ANEW = (".index.json", "README.md", COMPACT_INDEX, TORCHAO_FILE, NOTES_FILE)


def save_pruned(
    model: PreTrainedModel | str | os.PathLike,
    mask: Mask,
    folder: Path | str,
    *,
    form: str = "dense",
    quantize: str | None = None,
    windows: Tensor | None = None,
    runtime: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    title: str = "",
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned checkpoint, with its model card. The folder appears complete or not at all.

    Args:
        model: name or folder of the base, whose weights are pruned while they are copied; or a model in memory, whose
            own values are written where they differ from its files, in the dtype of the files.
        mask: which weights to keep; the others are +0.0.
        folder: the new folder.
        form: dense (an ordinary checkpoint) or compact (see ``proxsparse.model.compact``).
        quantize: int8, fp8 or int4: weights of compressed-tensors; with compact, int8: compact weights of int8 values.
        windows: (N, T) calibration token ids. With int4 and a model in memory, whose weights change in place: later
            inputs of a weight make up for the rounding error of earlier ones. None: to nearest.
        runtime: also write what this server needs, see ``proxsparse.deploy.runtimes.RUNTIMES``.
        tokenizer: written only where the model has no files to copy one from.
        revision: revision of a Hub model that is given by name.
        trust_remote_code: run code that comes with the model.
        title: title of the model card; default: the folder's name.
        results: results for the card, see ``proxsparse.deploy.card.model_card``.

    Raises:
        UsageError: mask, form, quantisation or runtime do not go with the model, or the folder holds something else.
        RunError: the base's files are missing or damaged, or compressed-tensors is not installed.
    """
    folder = Path(folder)
    model = model if isinstance(model, PreTrainedModel) else name_of(model)
    _check_wanted(folder, form, mask, quantize)
    mask = _with_rounding(mask, windows, quantize, model)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    base, shape = _named(model, mask, hub) if isinstance(model, str) else _in_memory(model, mask)
    if quantize is not None and (base is not None or form == "dense"):
        check_base(base, model if isinstance(model, str) else "the model")
    if runtime is not None:
        check_runtime(runtime, shape, mask, form, quantize)
    if base is None and isinstance(model, str):
        shape, tokenizer = load_model(model, **hub), load_tokenizer(model, **hub)
    with doing(f"writing {folder}"), quiet_bars(), atomic_path(folder) as scratch:
        scratch.mkdir()
        if base is not None:
            _write_from_files(base, shape, mask, scratch, form, quantize, windows)
        else:
            _save_from_memory(shape, mask, tokenizer, scratch, form, quantize)
        card = model_card(title or folder.name, mask, results, form=form, origin=quantize or _origin(base))
        _describe(scratch, shape, mask, card)
        if runtime is not None:
            write_runtime(scratch, served=folder)


def _describe(folder: Path, model: PreTrainedModel, mask: Mask, card: str) -> None:
    """The card, the order of the channels, and what mask it is."""
    (folder / "README.md").write_text(card, encoding="utf-8")
    note = {"base_model": mask.base_model, "pattern": str(mask.pattern), "info": mask.info}
    dense = [target.name for target in find_prunable(model, multiple=1) if target.name not in mask.tensors]
    write_json(folder / OWN, note | ({"dense": dense} if dense else {}))
    if mask.order.moves:
        save_order(mask.order, folder / ORDER_FILE)
    if mask.order:
        config = dict(read_json(folder / "config.json"))
        write_json(folder / "config.json", config | {NOTE: mask.order.digest})


def _origin(base: Checkpoint | None) -> str:
    """Where the weights come from, as the card says it."""
    if base is None:
        return "memory"
    if base.is_rounded:
        return "rounded"
    return "files" if base.is_plain or base.is_compact else "dequantised"


def _check_wanted(folder: Path, form: str, mask: Mask, quantize: str | None) -> None:
    refuse_folder(folder)
    refuse_trained(folder, mask.info)
    if form not in FORMS:
        raise UsageError(f"`form` must be one of {', '.join(FORMS)}; got {form!r}.", "form")
    if form == "compact":
        check_pattern(mask.pattern)
    if quantize is not None:
        check_quantisation(quantize, form)


def _with_rounding(mask: Mask, windows: Tensor | None, quantize: str | None, model: PreTrainedModel | str) -> Mask:
    """The mask, whose information says by what its weights are rounded."""
    if windows is None:
        return mask
    if quantize != "int4" or isinstance(model, str):
        raise UsageError("`windows` are for `quantize=int4` of a model in memory.", "windows")
    check_windows(windows, model.config)
    return replace(mask, info={"rounding": f"error feedback, {windows.numel():,} tokens"} | mask.info)


def _write_from_files(
    base: Checkpoint,
    model: PreTrainedModel,
    mask: Mask,
    folder: Path,
    form: str,
    quantize: str | None,
    windows: Tensor | None,
) -> None:
    changes = Changes(base, model, mask)
    quantiser = Quantiser(quantize, model, changes.layout) if quantize and form == "dense" else None
    if quantiser is not None and windows is not None:
        with doing("rounding the weights"):
            scales = round_layers(model, mask, windows, quantiser.settings)
        quantiser.scales = {stored: scales[target.name] for stored, target in quantiser.names.items()}
    _copy_small_files(base, folder, renamed=form != "dense" or not base.is_plain or quantiser is not None)
    if form == "compact":
        _stream_compact(base, changes, folder, quantize)
    else:
        _stream(base, changes, folder, quantiser)
    if quantiser is not None:
        config = dict(read_json(folder / "config.json"))
        write_json(folder / "config.json", config | {"quantization_config": quantiser.configuration()})


def _named(name: str, mask: Mask, hub: dict[str, Any]) -> tuple[Checkpoint | None, PreTrainedModel]:
    """The files of a model on disk or on the Hub (None: a GGUF), and the model without values."""
    empty = empty_model(name, **hub)
    fit_mask(empty, mask)  # before anything is downloaded
    check_order(empty, mask.order)
    return None if model_source(name)[1] else fetch(name, hub["revision"]), empty


def _in_memory(model: PreTrainedModel, mask: Mask) -> tuple[Checkpoint | None, PreTrainedModel]:
    """The files that a model came from, if there are any, and the model."""
    recall_order(model, named=mask.order)
    if order_of(model) != mask.order:
        raise UsageError("The mask is for another order of the model's channels: call apply_mask(model, mask) first.")
    return _files_of(model), model


def _files_of(model: PreTrainedModel) -> Checkpoint | None:
    """The files that a model in memory came from; None where there are none, or where it is another one by now."""
    name = getattr(model.config, "_name_or_path", "")
    try:
        found = Checkpoint.find(name, commit_of(model)) if name else None
    except UsageError:  # the folder that it came from is gone
        return None
    if found is None:
        return None
    add_small_files(found)
    layout, own = Layout(found.tensors, model), model.named_parameters()
    shapes = {name: shape for group in layout.groups for name, shape in group.parameters.items()}
    tied = {name for pair in (model.all_tied_weights_keys or {}).items() for name in pair}
    same = all(shapes.get(name) == tuple(p.shape) for name, p in own if name not in tied or name in shapes)
    return found if same else None


def _copy_small_files(base: Checkpoint, folder: Path, renamed: bool) -> None:
    """Everything but weights and hidden files, as it is; the configuration of dequantised weights says so.

    Args:
        renamed: whether the files of weights get other names than the base's, one of which its configuration may give.
    """
    for place in (base.folder, *(path for path in sorted(base.folder.rglob("*")) if path.is_dir())):
        inner = place.relative_to(base.folder)
        names = [path.name for path in place.iterdir()]
        other = place != base.folder and any(name == "config.json" or name.endswith(WEIGHTS) for name in names)
        if other or any(part.startswith(".") for part in inner.parts):
            continue  # a model of its own, the same one in another format, or git's folder
        for name in names:
            copied = not name.startswith(".") and not name.endswith((*WEIGHTS, *ANEW))
            if copied and (place / name).is_file():
                (folder / inner).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(place / name, folder / inner / name)
    dequantised = not base.is_plain and not base.is_compact
    config = without_quantisation(base.config) if dequantised else dict(base.config)
    if (renamed and config.pop("transformers_weights", None)) or dequantised:
        write_json(folder / "config.json", config)
    if dequantised:
        for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
            (folder / name).unlink(missing_ok=True)


def _stream(base: Checkpoint, changes: Changes, folder: Path, quantiser: Quantiser | None) -> None:
    """Write the tensors file by file, in files of the same division: one is in memory at a time."""
    as_it_is = base.is_plain and quantiser is None
    written: dict[str, str] = {}
    size = 0
    for number, path in enumerate(base.files, 1):
        name = path.name if as_it_is else _file_name("model", number, len(base.files))
        tensors: dict[str, Tensor] = {}
        for key, stored in base.of_file(path).items():
            tensor, _ = changes.of(key, stored.read())
            tensors |= quantiser.parts(key, tensor) if quantiser else {key: tensor.contiguous()}
        save_file(tensors, folder / name, metadata=base.metadata(path))
        written |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if as_it_is and len(base.files) > 1:
        shutil.copyfile(base.folder / base.first, folder / base.first)
    elif len(base.files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": written})


def _stream_compact(base: Checkpoint, changes: Changes, folder: Path, quantize: str | None) -> None:
    """Write the compact form as ``_stream`` does the dense one; a weight that is N:M along no dimension stays dense."""
    pattern = changes.mask.pattern
    index: dict[str, dict[str, Any]] = {}
    for number, path in enumerate(base.files, 1):
        tensors: dict[str, Tensor] = {}
        for key, stored in base.of_file(path).items():
            tensor, kept = changes.of(key, stored.read())
            dim = None if kept is None else _input_dim(kept, pattern)
            if dim is None:
                tensors[key] = tensor.contiguous()
            else:
                rows = tensor.movedim(dim, -1)
                tensors |= packed(key, rows, quantize, pattern)
                index[key] = index_entry(rows, dim, quantize)
        name = _file_name("compact", number, len(base.files))
        save_file(tensors, folder / name, metadata=base.metadata(path))
    write_index(folder, index, quantize, pattern)


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _input_dim(kept: Tensor, pattern: Pattern) -> int | None:
    """The last dimension along which a mask is N:M, as the file lays it out; None: along none."""
    for dim in reversed(range(kept.dim())):
        mask = kept.movedim(dim, -1)
        if mask.shape[-1] % pattern.m == 0 and not pattern.violations(mask.to(torch.uint8)).any():
            return dim
    return None


def _save_from_memory(
    model: PreTrainedModel,
    mask: Mask,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    form: str,
    quantize: str | None,
) -> None:
    """Write a model that has no files."""
    put_into_order(model, mask.order)
    targets = fit_mask(model, mask)
    state = dict(model.state_dict())
    for name, target in targets.items():
        kept = mask.tensors[name].movedim(-1, target.in_dim)
        state[name] = state[name].masked_fill(~kept.to(state[name].device), 0.0)
    if form == "dense":
        model.save_pretrained(folder, state_dict=state)
    else:
        index = {}
        for name, target in targets.items():
            rows = target.rows(state.pop(name))
            state |= packed(name, rows, quantize, mask.pattern)
            index[name] = index_entry(rows, target.in_dim, quantize)
        save_torch_state_dict(state, folder, filename_pattern="compact{suffix}.safetensors")
        write_index(folder, index, quantize, mask.pattern)
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
