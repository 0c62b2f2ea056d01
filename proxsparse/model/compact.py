"""The compact 2:4 store: two kept values a block and their positions, 9/16 of a dense 16-bit weight, bit for bit.

A folder in this form has config.json, the tokenizer, compact.json (which weights are compact, and their shapes) and
compact*.safetensors: for every pruned weight ``NAME.values`` (O, I / 2) and ``NAME.positions`` (O, ceil(I / 8)) uint8,
four 2-bit positions a byte, lowest first; every other tensor as it was. Rows have the input dimension last. Experts
are (E, O, ...).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import RunError, UsageError
from proxsparse.model.hub_errors import quiet_bars
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.operator.prox import top2_mask
from proxsparse.record import atomic_path, versions, write_json

FORMAT = "proxsparse-compact-1"
INDEX = "compact.json"


def compress(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values and positions of a 2:4 weight.

    Args:
        rows: (..., I) with at most two non-zeros in every block of four.

    Returns:
        (..., I / 2) values in the weight's dtype, and (..., I / 2) uint8 positions, ascending within each block.

    Raises:
        ValueError: a block has more than two non-zeros.
    """
    blocks = rows.unflatten(-1, (-1, 4))
    if TWO_OF_FOUR.violations(rows).any():
        raise ValueError("a block has more than two non-zeros")
    positions = top2_mask(rows.float()).unflatten(-1, (-1, 4)).nonzero()[:, -1].view(*blocks.shape[:-1], 2)
    return blocks.gather(-1, positions).flatten(-2), positions.to(torch.uint8).flatten(-2)


def decompress(values: Tensor, positions: Tensor) -> Tensor:
    """The dense weight: (..., I / 2) values and positions -> (..., I), zeros are +0.0."""
    pairs, places = values.unflatten(-1, (-1, 2)), positions.long().unflatten(-1, (-1, 2))
    return values.new_zeros(*pairs.shape[:-1], 4).scatter_(-1, places, pairs).flatten(-2)


def pack_positions(positions: Tensor) -> Tensor:
    """(..., n) uint8 in 0..3 -> (..., ceil(n / 4)) uint8."""
    padded = torch.nn.functional.pad(positions, (0, -positions.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return padded[..., 0] | padded[..., 1] << 2 | padded[..., 2] << 4 | padded[..., 3] << 6


def unpack_positions(packed: Tensor, count: int) -> Tensor:
    """Inverse of ``pack_positions``: the first ``count`` positions of each row."""
    return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)[..., :count]


def save_compact(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str, max_shard_size: str = "5GB"
) -> None:
    """Write a pruned model in the compact form. The folder appears complete or not at all.

    Raises:
        UsageError: a prunable weight is not 2:4.
    """
    state = model.state_dict()
    shapes = {}
    for target in find_prunable(model):
        rows = target.rows(state.pop(target.name))
        try:
            values, positions = compress(rows)
        except ValueError as error:
            raise UsageError(f"{target.name} is not 2:4, so it has no compact form: {error}.") from error
        state[f"{target.name}.values"] = values.contiguous()
        state[f"{target.name}.positions"] = pack_positions(positions).contiguous()
        shapes[target.name] = {"rows": list(rows.shape), "in_dim": target.in_dim}
    with atomic_path(folder) as scratch:
        save_tensors(state, model, tokenizer, scratch, "compact", max_shard_size)
        write_json(scratch / INDEX, {"format": FORMAT, "weights": shapes, "versions": versions()})


def save_tensors(
    state: dict[str, Tensor],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    stem: str = "model",
    max_shard_size: str = "5GB",
) -> None:
    """Write a new folder: tensors in shards STEM*.safetensors, and the model's configurations and tokenizer.

    Args:
        state: name -> tensor; tied weights are left out.
    """
    folder.mkdir()
    state = {name: tensor for name, tensor in state.items() if name not in (model.all_tied_weights_keys or {})}
    with quiet_bars():
        pattern = stem + "{suffix}.safetensors"
        save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size=max_shard_size)
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def is_compact(folder: Path | str) -> bool:
    return (Path(folder) / INDEX).is_file()


def load_compact(folder: Path | str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Rebuild the dense model of a compact folder, bit for bit.

    Raises:
        UsageError: not a compact folder.
        RunError: it is damaged; names the tensor.
    """
    folder = Path(folder)
    if not is_compact(folder):
        raise UsageError(f"{folder} has no {INDEX}, so it is not in the compact form.")
    config = AutoConfig.from_pretrained(folder)
    state = dict(_dense_tensors(folder))
    wanted = (config.dtype or torch.float32) if isinstance(dtype, str) else dtype
    model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    missing, unknown = model.load_state_dict(state, strict=False)
    absent = sorted(set(missing) - set(model.all_tied_weights_keys or {}))
    if unknown or absent:
        differs = f"holds {unknown[0]}, which it lacks" if unknown else f"lacks {absent[0]}"
        raise RunError(f"{folder} does not fit its config.json, a {type(model).__name__}: it {differs}.")
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model.eval()


def _dense_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a compact folder, dense, one at a time."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UsageError(f"{folder / INDEX} has format {index['format']!r}; this version reads {FORMAT!r}.")
        shapes = {name: (tuple(w["rows"]), int(w["in_dim"])) for name, w in index["weights"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise RunError(f"{folder / INDEX} is damaged ({error}); export the model again.") from error
    # Values and positions of one weight may lie in different shards.
    places: dict[str, Path] = {}
    path = folder
    try:
        for path in sorted(folder.glob("compact*.safetensors")):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
        for name in places:
            base, _, part = name.rpartition(".")
            path = places[name]
            if base not in shapes:
                yield name, _tensor(places, name)
            elif part == "values":
                rows, in_dim = shapes[base]
                yield base, _rebuilt(_tensor(places, name), _tensor(places, f"{base}.positions"), rows, in_dim)
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); export the model again.") from error
    missing = {name for name in shapes if f"{name}.values" not in places}
    if missing:
        raise RunError(f"{folder} lacks {len(missing)} weights, as {sorted(missing)[0]}; export the model again.")


def _tensor(places: dict[str, Path], name: str) -> Tensor:
    with safe_open(places[name], framework="pt") as file:
        return file.get_tensor(name)


def _rebuilt(values: Tensor, packed: Tensor, rows: tuple[int, ...], in_dim: int) -> Tensor:
    if tuple(values.shape) != (*rows[:-1], rows[-1] // 2) or packed.dtype != torch.uint8:
        raise ValueError(f"values of shape {tuple(values.shape)} do not make a weight of {rows}")
    positions = unpack_positions(packed, rows[-1] // 2)
    pairs = positions.unflatten(-1, (-1, 2))
    if not (pairs[..., 0] < pairs[..., 1]).all():
        raise ValueError("positions of a block are not ascending")
    return decompress(values, positions).movedim(-1, in_dim).contiguous()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor for the CPU kernels: bfloat16 as its uint16 bits."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
