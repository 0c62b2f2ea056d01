"""Quantise a pruned model to 8 bits with its zeros kept: a compressed-tensors checkpoint in the dense layout.

Every row of a weight gets one scale, symmetric around zero, so a zero's code is 0 and stands for exactly 0.0 again.
Activations are quantised per token while the model runs. The package compressed-tensors, which owns the format, writes
the configuration, computes the scales and makes the codes; transformers and vLLM read the result by themselves.

Shapes: O = out_features, I = in_features. Codes are (O, I), scales (O, 1).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxsparse.errors import RunError, UsageError
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.coded import SCALE
from proxsparse.model.compact import KINDS as COMPACT_KINDS
from proxsparse.model.hub_errors import installed
from proxsparse.model.layout import Layout
from proxsparse.model.prunable import find_prunable
from proxsparse.model.quantised import quantisation, scheme_of

# kind -> (preset of compressed-tensors, the format's name)
KINDS = {"int8": ("INT8", "int-quantized"), "fp8": ("FP8_DYNAMIC", "float-quantized")}
MINUS_ZERO = 0x80  # -0.0 in float8


class Quantiser:
    """Quantises the linear weights in the layers of one model.

    Args:
        kind: int8 or fp8 (e4m3).
        model: of the checkpoint's class; it may have no values.
        layout: how the checkpoint's tensors become the model's parameters.

    Raises:
        UsageError: a weight is no nn.Linear, which the format has no place for.
    """

    def __init__(self, kind: str, model: PreTrainedModel, layout: Layout):
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import preset_name_to_scheme

        preset, self.format = KINDS[kind]
        self._scheme: Any = preset_name_to_scheme(preset, ["Linear"])
        self._compressor: Any = BaseCompressor.get_value_from_registry(self.format)
        self.names = set(_stored_names(model, layout))
        self.ignored = sorted(_other_layers(model, layout, self.names))

    def parts(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The codes and scales of a weight, by their names in the file; another tensor as it is.

        Args:
            name: name of the tensor in the files.
            weight: (O, I) where it is quantised, pruned entries +0.0.
        """
        if name not in self.names:
            return {name: weight}
        from compressed_tensors.quantization.utils import calculate_qparams

        exact = weight.float()
        least, most = exact.aminmax(dim=1, keepdim=True)
        # Rounded to the weight's dtype first, so that the codes are those of the scale that is stored.
        scale = calculate_qparams(least, most, self._scheme.weights)[0].to(weight.dtype)
        # Of rows that are all zeros. float16's smallest normal number would be too large for rows of small weights.
        scale = scale.clamp(min=2.0**-18 if weight.dtype == torch.float16 else torch.finfo(weight.dtype).tiny)
        found = self._compressor.compress({"weight": exact, "weight_scale": scale.float()}, self._scheme)
        codes = found["weight"].contiguous()
        if codes.dtype.is_floating_point:  # small negative weights round to -0.0
            raw = codes.view(torch.uint8)
            raw[raw == MINUS_ZERO] = 0
        return {name: codes, f"{name}{SCALE}": scale.contiguous()}

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


def check_quantisation(kind: str, form: str) -> None:
    """Refuse what can't be written, before anything is read.

    Args:
        kind: int8, or fp8 in the dense form.
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
            "`quantize` of proxsparse."
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


def _stored_names(model: PreTrainedModel, layout: Layout) -> Iterable[str]:
    """The names in the files of the weights that are quantised: all linear ones in the layers, pruned or not."""
    for target in find_prunable(model, multiple=1):
        group = layout.of_parameter.get(target.name)
        stored = "" if group is None or not group.renamed else next(iter(group.shapes))
        if type(target.module) is not nn.Linear or not stored.endswith(".weight"):
            raise UsageError(
                f"{target.name} is no plain linear layer (it is part of {type(target.module).__name__}, or stored in "
                "pieces), which this format can't hold: export the model without `quantize`.",
                "quantize",
            )
        yield stored


def _other_layers(model: PreTrainedModel, layout: Layout, quantised: set[str]) -> Iterable[str]:
    """The linear layers that stay as they are, by the names of the model and of the files."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        group = layout.of_parameter.get(f"{path}.weight")
        stored = f"{path}.weight" if group is None else next(iter(group.shapes))
        if stored not in quantised:
            yield from {path, stored.removesuffix(".weight")}
