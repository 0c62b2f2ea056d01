"""Quantise a pruned model to 8 or 4 bits with its zeros kept: a compressed-tensors checkpoint in the dense layout.

Scales are symmetric around zero, so a zero's code is 0 and stands for exactly 0.0 again. With 8 bits every row of a
weight has one scale, and activations are quantised per token while the model runs. With 4 bits every group of
neighbouring inputs has one, and activations stay as they are. The package compressed-tensors, which owns the format,
writes the configuration, computes the scales and makes the codes; transformers and vLLM read the result by themselves.

Shapes: O = out_features, I = in_features. Codes are (O, I), scales (O, G), with G = 1 for 8 bits.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxsparse.errors import RunError, UsageError
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.coded import PACKED_FORMAT
from proxsparse.model.compact import KINDS as COMPACT_KINDS
from proxsparse.model.hub_errors import installed
from proxsparse.model.layout import Layout
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.model.quantised import quantisation, scheme_of

# kind -> (preset of compressed-tensors, the format's name)
KINDS = {
    "int8": ("INT8", "int-quantized"),
    "fp8": ("FP8_DYNAMIC", "float-quantized"),
    "int4": ("W4A16", PACKED_FORMAT),
}
GROUPS = (128, 64, 32)  # inputs that share a scale with 4 bits: those that vLLM's kernels take
MINUS_ZERO = 0x80  # -0.0 in float8


class Quantiser:
    """Quantises the linear weights in the layers of one model.

    Args:
        kind: int8, fp8 (e4m3) or int4.
        model: of the checkpoint's class; it may have no values.
        layout: how the checkpoint's tensors become the model's parameters.

    Attributes:
        scales: name of a weight in the files -> its (O, G) scales, where the weights are multiples of them already.

    Raises:
        UsageError: a weight is no nn.Linear, which the format has no place for; or, with 4 bits, its number of inputs
            is no multiple of 32.
    """

    def __init__(self, kind: str, model: PreTrainedModel, layout: Layout):
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import preset_name_to_scheme

        preset, self.format = KINDS[kind]
        self.names = _stored_names(model, layout)
        self._scheme: Any = preset_name_to_scheme(preset, ["Linear"])
        if self.settings.group_size:
            self.settings.group_size = _group_size(self.names)
        self._compressor: Any = BaseCompressor.get_value_from_registry(self.format)
        self.scales: Mapping[str, Tensor] = {}
        self.ignored = sorted(_other_layers(model, layout, set(self.names)))

    @property
    def settings(self) -> Any:
        """How weights are quantised: QuantizationArgs of compressed-tensors."""
        return self._scheme.weights

    def parts(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The codes and scales of a weight, by their names in the file; another tensor as it is.

        Args:
            name: name of the tensor in the files.
            weight: (O, I) where it is quantised, pruned entries +0.0.
        """
        if name not in self.names:
            return {name: weight}
        scale = self.scales.get(name)
        scale = scales_of(weight, self.settings) if scale is None else _not_zero(scale.to(weight.dtype))
        given = {"weight": weight.float(), "weight_scale": scale.float()}
        found = self._compressor.compress(given, self._scheme) | {"weight_scale": scale.contiguous()}
        codes = found.get("weight")
        if codes is not None and codes.dtype.is_floating_point:  # small negative weights round to -0.0
            raw = codes.view(torch.uint8)
            raw[raw == MINUS_ZERO] = 0
        stem = name.removesuffix("weight")
        return {f"{stem}{part}": tensor.contiguous() for part, tensor in found.items()}

    def configuration(self) -> dict[str, Any]:
        """The entry quantization_config of config.json."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        found = QuantizationConfig(
            config_groups={"group_0": self._scheme},
            format=self.format,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=self.ignored,
        )
        return found.model_dump(mode="json", exclude_none=True)


def scales_of(weight: Tensor, settings: Any) -> Tensor:
    """Scales of a weight, symmetric around zero, such that the codes span its rows or groups of inputs.

    Args:
        weight: (O, I).
        settings: QuantizationArgs of compressed-tensors.

    Returns:
        (O, G) in the weight's dtype; G is 1 without groups.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.float().unflatten(1, (-1, settings.group_size or weight.shape[1]))
    least, most = groups.aminmax(dim=2)
    # Rounded to the weight's dtype first, so that the codes are those of the scale that is stored.
    scale = calculate_qparams(least, most, settings)[0].to(weight.dtype)
    return _not_zero(scale)


def _not_zero(scale: Tensor) -> Tensor:
    """Scales, also of rows of zeros. float16's smallest normal number is too large for rows of small weights."""
    return scale.clamp(min=2.0**-18 if scale.dtype == torch.float16 else torch.finfo(scale.dtype).tiny)


def check_quantisation(kind: str, form: str) -> None:
    """Refuse what can't be written, before anything is read.

    Args:
        kind: int8, or fp8 or int4 in the dense form.
        form: form of the export.

    Raises:
        UsageError: another kind, or a form without weights.
        RunError: the dense form needs compressed-tensors, which is not installed.
    """
    if kind not in KINDS:
        raise UsageError(f"`quantize` must be one of {', '.join(KINDS)}; got {kind!r}.", "quantize")
    if form not in ("dense", "compact"):
        raise UsageError(f"`quantize` needs the form dense or compact; got `form={form}`.", "quantize")
    if form == "compact" and kind not in COMPACT_KINDS:
        raise UsageError(
            f"`quantize={kind}` needs the dense form; the compact form takes {' or '.join(COMPACT_KINDS)}.", "quantize"
        )
    if form == "dense" and not installed("compressed_tensors"):
        raise RunError(
            "Quantising needs the package compressed-tensors: pip install 'compressed-tensors>=0.20', the extra "
            "[quantize] of proxsparse."
        )


def check_base(base: Checkpoint | None, name: str) -> None:
    """Refuse to quantise what has no plain files of its own.

    Args:
        base: the model's files; None where it has none.
        name: name of the model.

    Raises:
        UsageError: the model is quantised already, or has no files.
    """
    if base is None:
        raise UsageError(
            f"`quantize` reads a checkpoint's own files, and {name} has none: write the pruned model first without "
            "`quantize`, then quantise that folder.",
            "quantize",
        )
    entry = quantisation(base.config)
    if entry is not None or base.is_rounded:
        scheme = "compact int8" if entry is None else scheme_of(entry)
        raise UsageError(
            f"The model {name} is quantised already ({scheme}): give the original weights, or export it "
            "without `quantize`.",
            "quantize",
        )


def _stored_names(model: PreTrainedModel, layout: Layout) -> dict[str, Prunable]:
    """The weights that are quantised, by their names in the files: all linear ones in the layers, pruned or not."""
    names: dict[str, Prunable] = {}
    for target in find_prunable(model, multiple=1):
        group = layout.of_parameter.get(target.name)
        stored = "" if group is None or not group.renamed else next(iter(group.shapes))
        if type(target.module) is not nn.Linear or not stored.endswith(".weight"):
            raise UsageError(
                f"{target.name} is no plain linear layer (it is part of {type(target.module).__name__}, or stored in "
                "pieces), which this format can't hold: export the model without `quantize`.",
                "quantize",
            )
        names[stored] = target
    return names


def _group_size(weights: Mapping[str, Prunable]) -> int:
    """The largest number of inputs that can share a scale in all weights."""
    for size in GROUPS:
        if all(target.weight.shape[target.in_dim] % size == 0 for target in weights.values()):
            return size
    name, target = next((n, t) for n, t in weights.items() if t.weight.shape[t.in_dim] % GROUPS[-1])
    raise UsageError(
        f"{name} has {target.weight.shape[target.in_dim]} inputs, and with 4 bits their number must be a multiple of "
        f"{GROUPS[-1]}: use `quantize=int8`.",
        "quantize",
    )


def _other_layers(model: PreTrainedModel, layout: Layout, quantised: set[str]) -> Iterable[str]:
    """The linear layers that stay as they are, by the names of the model and of the files."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        group = layout.of_parameter.get(f"{path}.weight")
        stored = f"{path}.weight" if group is None else next(iter(group.shapes))
        if stored not in quantised:
            yield from {path, stored.removesuffix(".weight")}
