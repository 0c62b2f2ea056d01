"""Kernels that compute from 2:4 weights: what each asks of a weight, and what a server needs to use them.

    torchao      float8 2:4 on NVIDIA GPUs of compute capability 9.0, which vLLM can quantise to while it loads
    cusparselt   torch.sparse.to_sparse_semi_structured, its backend since Hopper
    cutlass      the same function's backend for GPUs of compute capability 8.x

Sources: torch's own table of shapes; torchao 0.18, quantization/utils.py, ``_fp8_mm_compat``. A weight that a kernel
can't take stays dense. A pruned weight of -0.0 counts as a non-zero in CUTLASS
(https://github.com/vllm-project/vllm/pull/13198).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from transformers import PreTrainedModel

from proxsparse.errors import UsageError
from proxsparse.mask import Mask
from proxsparse.model.hub import fetch
from proxsparse.model.layout import Layout
from proxsparse.model.loading import empty_model
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.record import write_json

Shapes = dict[torch.dtype, tuple[int, int]]  # dtype -> what rows and columns must be multiples of


def _of_torch(kind: Any) -> Shapes:
    sixteen = (torch.float16, torch.bfloat16)
    table = kind._DTYPE_SHAPE_CONSTRAINTS
    return {dtype: (table[dtype].sparse_min_rows, table[dtype].sparse_min_cols) for dtype in sixteen}


TARGETS: dict[str, Shapes] = {
    "torchao": {torch.float32: (16, 16), torch.float16: (16, 16), torch.bfloat16: (16, 16)},
    "cusparselt": _of_torch(SparseSemiStructuredTensorCUSPARSELT),
    "cutlass": _of_torch(SparseSemiStructuredTensorCUTLASS),
}
RUNTIMES = ("vllm-torchao",)
TORCHAO_FILE, NOTES_FILE = "torchao_config.json", "SERVING.md"
PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {}}
# What torchao.core.config.config_from_dict reads; what is not named has torchao's defaults.
TORCHAO_CONFIG = {
    "_type": "Float8DynamicActivationFloat8WeightConfig",
    "_version": 2,
    "_data": {
        "granularity": [PER_ROW, PER_ROW],
        "packing_format": {"_type": "Float8PackingFormat", "_data": "SPARSE_2D_DATA_2D_METADATA"},
    },
}
NOTES = """# Serving this model with float8 2:4

The checkpoint is an ordinary one. vLLM quantises it to float8 while it loads, and packs its 2:4 weights for torchao's
kernel:

```bash
vllm serve {folder} --dtype bfloat16 --quantization torchao \\
    --hf-overrides '{overrides}'
```

* It needs an NVIDIA GPU of compute capability 9.0 (H100, H200), and torchao next to vLLM.
* torchao 0.18 reads `{config}`.
* Activations are quantised per token. So measure the quality again.
* 2:4 pays where many tokens are computed at once: prefill, large batches. Measure it with `vllm bench` against the same
  checkpoint with `--quantization fp8`, which is dense.
* The authors of proxsparse have not run this on a GPU.
"""


def dense_weights(
    name: str, target: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, list[str]]:
    """Which weights of a pruned checkpoint a kernel can't compute sparse, and why.

    Args:
        name: a pruned checkpoint with plain weights: folder or Hub id.
        target: one of ``TARGETS``.
        revision: revision of a model on the Hub.
        trust_remote_code: run code that comes with the model.

    Returns:
        (number of weights that could be sparse, one sentence per weight that stays dense).

    Raises:
        UsageError: another target, or the checkpoint is quantised.
    """
    if target not in TARGETS:
        raise UsageError(f"`target` must be one of {', '.join(TARGETS)}; got {target!r}.", "target")
    model = empty_model(name, revision=revision, trust_remote_code=trust_remote_code)
    layout = Layout(fetch(name, revision).tensors, model)
    targets = find_prunable(model, multiple=1)
    found: list[str] = []
    for weight in targets:
        reason = _refusal(weight, layout.read(layout.of_parameter[weight.name])[weight.name], TARGETS[target])
        if reason:
            found.append(f"{weight.name}: {reason}")
    return len(targets) - len(found), found


def _refusal(weight: Prunable, tensor: Tensor, shapes: Shapes) -> str | None:
    """Why a kernel can't take a weight; None: it can."""
    if type(weight.module) is not nn.Linear:
        return f"is part of {type(weight.module).__name__}, not of a linear layer"
    if tensor.dtype not in shapes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in shapes)
        return f"is {str(tensor.dtype).removeprefix('torch.')}, and the kernel takes {kinds}"
    rows, columns = shapes[tensor.dtype]
    if tensor.shape[0] % rows or tensor.shape[1] % columns:
        return f"has shape {tuple(tensor.shape)}, not multiples of ({rows}, {columns})"
    if TWO_OF_FOUR.violations(tensor).any():
        return "is not 2:4"
    # By bits: a kernel that looks for non-zero bits counts -0.0.
    if TWO_OF_FOUR.violations(tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)).any():
        return "has -0.0 among its zeros, which counts as a third non-zero of a block: export the model again"
    return None


def check_runtime(runtime: str, model: PreTrainedModel, mask: Mask, form: str, quantize: str | None) -> None:
    """Refuse what a runtime can't use, before anything is written.

    torchao packs every linear layer that vLLM quantises, and would drop weights of one that is not 2:4.

    Raises:
        UsageError: another runtime or form, or a linear layer that the mask leaves dense.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"`runtime` must be one of {', '.join(RUNTIMES)}; got {runtime!r}.", "runtime")
    if form != "dense" or quantize:
        given = f"`quantize={quantize}`" if quantize else f"`form={form}`"
        raise UsageError(f"`runtime={runtime}` needs the plain dense form; got {given}.", "runtime")
    if mask.pattern != TWO_OF_FOUR:
        raise UsageError(f"`runtime={runtime}` needs a 2:4 mask; this one is {mask.pattern}.", "runtime")
    left = next(_left_dense(model, mask), None)
    if left is not None:
        raise UsageError(
            f"`runtime={runtime}` needs a mask of every linear layer, because torchao would drop weights of the "
            f"others: {left} is not in the mask.",
            "runtime",
        )


def _left_dense(model: PreTrainedModel, mask: Mask) -> Iterator[str]:
    """The linear layers of the decoder that a mask leaves as they are, and what else vLLM would quantise."""
    head = model.get_output_embeddings()
    masked = {name.removesuffix(".weight") for name in mask.tensors}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and path not in masked:
            yield path
    yield from (t.name for t in find_prunable(model, multiple=1) if type(t.module) is not nn.Linear)


def write_runtime(folder: Path, served: Path) -> None:
    """Write torchao's configuration and the notes on serving into a folder.

    Args:
        served: where the folder will be.
    """
    write_json(folder / TORCHAO_FILE, TORCHAO_CONFIG)
    overrides = json.dumps({"quantization_config_file": str(served / TORCHAO_FILE)})
    text = NOTES.format(folder=served, overrides=overrides, config=TORCHAO_FILE)
    (folder / NOTES_FILE).write_text(text, encoding="utf-8")
