"""The model card of a pruned checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData

from proxsparse.mask import MASK_FILE, Mask
from proxsparse.model.channels import ORDER_FILE

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}, pruned to {{ pattern }}

This is {{ base }} with {{ kept }} of its prunable weights kept ({{ pattern }}). {{ origin }} the others are exact
zeros. The kept weights were chosen by {{ method }}, with the tools of [ProxSparse](https://arxiv.org/abs/2502.00258).
{% if moved %}
The channels stand in another order than in the base, which changes nothing of what the model computes.
`{{ moved }}` says which.
{% endif %}{% if settings %}
| setting | value |
|---|---|
{% for key, value in settings %}| {{ key }} | {{ value }} |
{% endfor %}{% endif %}{% if results %}
| text | perplexity | windows of |
|---|--:|--:|
{% for text, value, error, length in results %}| {{ text }} | {{ value }} +- {{ error }} | {{ length }} tokens |
{% endfor %}{% endif %}
## How to load it

{{ loading }}

A dense checkpoint with zeros runs at dense speed. `proxsparse bench` shows what {{ pattern }} gains on your machine.
"""
DENSE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```"""
CODED = """
transformers needs the package `compressed-tensors` to read it; vLLM reads it by itself."""
COMPACT = """```python
import proxsparse
from huggingface_hub import snapshot_download

folder = snapshot_download("{name}")             # or the folder itself, where it lies on your disk
model = proxsparse.load(folder)                  # the dense model
model = proxsparse.load(folder, sparse=True)     # compact weights: faster decoding on a CPU
```"""
MASK = """This is the mask alone, one bit per weight; the weights are those of the base model.

```bash
hf download {name} {mask} --local-dir mask         # not needed where the folder lies on your disk
proxsparse export --model {base} --mask mask/{mask} --to pruned
```"""
NPZ = """This is the mask alone, packed as MaskLLM's programs read it: `eval_llama_ppl.py --model {base} --mask
mask_compressed.npz`."""
ORIGINAL = {
    "files": "The kept weights are the original ones, bit for bit;",
    "dequantised": "The original weights are quantised; the kept ones are their values in bfloat16;",
    "memory": "The base has no files to copy from: configuration, tokenizer and all tensors were written anew with "
    "transformers {version}. The kept weights are those that it loads;",
}
QUANTISED = "The weights of the layers are quantised to {kind}, one scale per {share};"
SHARES = {"int8": "output", "fp8": "output", "int4": "group of neighbouring inputs"}
ORIGINAL["rounded"] = "The original weights are quantised; the kept ones are their values;"
ORIGINAL |= {kind: QUANTISED.format(kind=kind, share=share) for kind, share in SHARES.items()}
UPDATED = "The kept weights were updated by {method};"
LOADING = {"dense": DENSE, "compact": COMPACT, "mask": MASK, "npz": NPZ}


def model_card(
    name: str, mask: Mask, results: Mapping[str, Any] | None = None, *, form: str = "dense", origin: str = "files"
) -> str:
    """Text of the README.md of a pruned checkpoint.

    Args:
        name: name of the folder or repository.
        mask: the mask that was applied; its info holds method and settings.
        form: form of the export, one of ``LOADING``.
        results: text -> fields of ``proxsparse.evaluation.perplexity.Perplexity``.
        origin: where the weights came from, one of ``ORIGINAL``.
    """
    info = {key: value for key, value in mask.info.items() if not isinstance(value, dict)}
    method = str(info.pop("method", "an unnamed method"))
    said = [ORIGINAL[origin].format(version=transformers.__version__)]
    by = info.get("weights_updated")
    if by:
        updated = UPDATED.format(method=by if isinstance(by, str) else method)
        said = [updated] if origin == "files" else [*said, updated]
    on_hub = mask.base_model.count("/") == 1 and not Path(mask.base_model).exists()
    structured = ["semi-structured-sparsity"] if mask.pattern.m > 1 else []
    data = ModelCardData(
        base_model=mask.base_model if on_hub else None,
        tags=[str(mask.pattern), *structured, "pruning", "proxsparse"],
        library_name="transformers" if form == "dense" else None,
        pipeline_tag="text-generation",
    )
    rows = [
        (text, f"{found['perplexity']:.2f}", f"{found['standard_error']:.2f}", found["ctx_len"])
        for text, found in (results or {}).items()
    ]
    loading = LOADING[form].format(name=name, base=mask.base_model, mask=MASK_FILE)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        base=mask.base_model or "the original model",
        kept=f"{mask.density():.0%}",
        pattern=mask.pattern,
        method=method,
        origin=" ".join(said),
        moved=(MASK_FILE if form == "mask" else ORDER_FILE) if mask.order.moves else "",
        settings=[(key, value) for key, value in info.items() if value is not None],
        results=rows,
        loading=loading + CODED if form == "dense" and origin in SHARES else loading,
    )
    return str(card)
