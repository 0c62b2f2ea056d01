"""Quantised checkpoints: recognised from config.json alone, then read as bfloat16 or refused.

Two kinds hold plain numbers in blocks with a scale each, and are dequantised wherever their weights are read:

    fp8      float8 with ``NAME_scale_inv`` per block: DeepSeek-V3 (arXiv:2412.19437, section 3.3), Qwen3-FP8; or
             with ``NAME_scale`` per tensor or row, as AutoFP8 writes it
    mxfp4    4-bit blocks of 32 with a shared exponent, ``NAME_blocks`` and ``NAME_scales``: gpt-oss (OCP MX formats)

Every other kind needs a package of its own, and has rounded the weights that pruning compares.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from proxsparse.errors import RunError, UsageError
from proxsparse.model.hub_errors import installed

READ = ("fp8", "mxfp4")
KEYS = ("quantization_config", "compression_config")
# scheme -> (its name, the package with which transformers reads it, and the name under which that is imported)
PACKAGES = {
    "gptq": ("GPTQ", "gptqmodel", "gptqmodel"),
    "awq": ("AWQ", "gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed-tensors", "compressed-tensors", "compressed_tensors"),
    "torchao": ("torchao", "torchao", "torchao"),
    "quanto": ("quanto", "optimum-quanto", "optimum.quanto"),
    "hqq": ("HQQ", "hqq", "hqq"),
    "aqlm": ("AQLM", "aqlm", "aqlm"),
    "eetq": ("EETQ", "kernels", "kernels"),
    "vptq": ("VPTQ", "vptq", "vptq"),
    "spqr": ("SpQR", "spqr_quant", "spqr_quant"),
    "quark": ("Quark", "amd-quark", "quark"),
    "auto-round": ("AutoRound", "auto-round", "auto_round"),
    "higgs": ("HIGGS", "flute-kernel", "flute"),
    "fbgemm_fp8": ("FBGEMM FP8", "fbgemm-gpu", "fbgemm_gpu"),
    "fp8": ("FP8", "kernels", "kernels"),
    "mxfp4": ("MXFP4", "kernels", "kernels"),
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Endings of what a dequantised checkpoint no longer has.
SCALES = ("_scale_inv", "activation_scale", "input_scale", "k_scale", "v_scale")


def quantisation(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantisation's entry of a config.json, also where it is nested (text_config); None: plain weights.

    Raises:
        UsageError: the entry is no mapping.
    """
    for key in KEYS:
        if config.get(key) is not None:
            if not isinstance(config[key], Mapping) or not config[key]:
                raise UsageError(
                    f"The config.json of the model has {key} {str(config[key])[:80]!r}, and it must be a mapping such "
                    'as {"quant_method": "fp8"}: get the file again.',
                    "model",
                )
            return dict(config[key])
    nested = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    return next((found for part in nested if (found := quantisation(part)) is not None), None)


def scheme_of(entry: Mapping[str, Any]) -> str:
    """Short name of a quantisation, as 'gptq' or 'fp8'."""
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    unnamed = "compressed-tensors" if {"config_groups", "format"} & set(entry) else "a method that it does not name"
    return str(entry.get("quant_method") or entry.get("quant_library") or unnamed).lower()


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for the dequantised weights: without the entry, and of dtype bfloat16."""

    def plain(part: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in part.items() if key not in KEYS}
        nested = {k: plain(v) for k, v in kept.items() if k.endswith("_config") and isinstance(v, Mapping)}
        dtypes = {key: "bfloat16" for key in ("torch_dtype", "dtype") if kept.get(key)}
        return kept | nested | dtypes

    found = plain(config)
    return found if {"torch_dtype", "dtype"} & set(found) else found | {"torch_dtype": "bfloat16"}


def refuse_quantised(name: str, config: Mapping[str, Any], evaluating: bool = False) -> str | None:
    """How a model is quantised: None (it is not), 'read' (dequantised here) or 'package' (a package reads it).

    Args:
        name: name of the model.
        config: its config.json.
        evaluating: the weights are only used, not pruned, so kinds that a package reads are accepted.

    Raises:
        UsageError: the weights are needed as numbers, and are not; or nothing reads them.
        RunError: the package that reads them is missing.
    """
    entry = quantisation(config)
    if entry is None:
        return None
    scheme = scheme_of(entry)
    if scheme in READ and not _packed_otherwise(entry):
        return "read"
    label, package, module = PACKAGES.get(scheme, (scheme, "", ""))
    if not evaluating:
        raise UsageError(
            f"The model {name} is quantised with {label}: its files hold codes instead of the weights that are to be "
            "compared. Give the original weights, those of the model that it was made from.",
            "model",
        )
    if scheme not in AUTO_QUANTIZER_MAPPING:
        raise UsageError(
            f"The model {name} is quantised with {label}, which transformers can't read: give the original weights.",
            "model",
        )
    if module and not installed(module):
        raise RunError(
            f"The model {name} is quantised with {label}, which the package {package} reads: install it, or give the "
            "original weights."
        )
    return "package"


def _packed_otherwise(entry: Mapping[str, Any]) -> bool:
    """Float8 in a layout that is not read here: experts packed in 4 bits."""
    return "fp4" in str(entry.get("expert_dtype", "")).lower() or "fp4" in str(entry.get("fmt", "")).lower()


def block_of(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Size of the float8 blocks of a weight (O, I); None: the shape of the scales says it.

    Raises:
        UsageError: it is no size.
    """
    sizes = entry.get("weight_block_size")
    if sizes is None:
        return None
    if isinstance(sizes, (list, tuple)) and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes):
        return sizes[0], sizes[1]
    raise UsageError(
        f"The config.json of the model has weight_block_size {str(sizes)[:80]}, and it must be two sizes such as "
        "[128, 128]: get the file again.",
        "model",
    )


def dequantise_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Weights of float8 codes: each code times the scale of its block, rounded to bfloat16.

    Args:
        codes: (..., O, I) float8.
        scale: (..., ceil(O / b0), ceil(I / b1)) of every block, or one number (per tensor, or per expert).
        block: (b0, b1), or None where the shape of the scales says it.

    Returns:
        (..., O, I) bfloat16.
    """
    scales = (scale.to(torch.float32) - 127).exp2() if scale.dtype == torch.uint8 else scale.to(torch.float32)
    rows, columns = codes.shape[-2:]
    if scales.numel() > 1 and scales.dim() >= 2:
        parts = tuple(scales.shape[-2:])
        high, wide = block or (0, 0)
        if not block or (-(-rows // high), -(-columns // wide)) != parts:
            high, wide = -(-rows // parts[0]), -(-columns // parts[1])
            if high * parts[0] != rows or wide * parts[1] != columns:
                raise RunError(f"scales of shape {tuple(scale.shape)} do not fit a weight of {tuple(codes.shape)}")
        scales = scales.repeat_interleave(high, -2).repeat_interleave(wide, -1)[..., :rows, :columns]
    elif scales.dim() == 1 and scales.numel() > 1:
        scales = scales.view(-1, *[1] * (codes.dim() - 1))  # one per expert
    else:
        scales = scales.reshape(-1)[0]
    return (codes.to(torch.float32) * scales).to(torch.bfloat16)


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Weights of gpt-oss: (E, O, G, 16) bytes with two codes each and (E, O, G) exponents -> (E, 32 G, O) bfloat16."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
