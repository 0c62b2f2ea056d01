"""ProxSparse: learn which two of every four weights a pretrained language model keeps.

    mask = proxsparse.learn_mask(model, tokenizer, windows)
    proxsparse.apply_mask(model, mask)                   # zeros in the original weights
    model = proxsparse.load("pruned", sparse=True)       # a pruned model, ready to generate
    from proxsparse import prox_op_, top2_mask           # the operator, for your own training loop

Every name in ``__all__`` is documented where it is defined; docs/python.md has examples.
"""

import importlib
from typing import TYPE_CHECKING, Any

from proxsparse.operator.prox import prox_op, prox_op_, regularizer, top2_mask

if TYPE_CHECKING:
    from proxsparse.deploy.dense import save_pruned as save_pruned
    from proxsparse.deploy.lora import masked_lora as masked_lora
    from proxsparse.deploy.lora import merge_lora as merge_lora
    from proxsparse.deploy.sparse import load as load
    from proxsparse.evaluation.perplexity import perplexity as perplexity
    from proxsparse.learning.keep import KeepMask as KeepMask
    from proxsparse.learning.keep import keep_mask as keep_mask
    from proxsparse.learning.learn import learn_mask as learn_mask
    from proxsparse.learning.recover import recover as recover
    from proxsparse.mask import Mask as Mask
    from proxsparse.mask import apply_mask as apply_mask
    from proxsparse.mask import load_mask as load_mask
    from proxsparse.mask import mask_of_pruned as mask_of_pruned
    from proxsparse.mask import save_mask as save_mask
    from proxsparse.model.loading import load_model as load_model
    from proxsparse.model.loading import load_tokenizer as load_tokenizer
    from proxsparse.text import calibration_windows as calibration_windows
    from proxsparse.text import evaluation_windows as evaluation_windows

__version__ = "0.1.0"

# These are imported when they are first used: transformers takes seconds to import, and the operator does not need it.
_LATER = {
    "load": "deploy.sparse",
    "save_pruned": "deploy.dense",
    "keep_mask": "learning.keep",
    "KeepMask": "learning.keep",
    "masked_lora": "deploy.lora",
    "merge_lora": "deploy.lora",
    "perplexity": "evaluation.perplexity",
    "learn_mask": "learning.learn",
    "recover": "learning.recover",
    "Mask": "mask",
    "apply_mask": "mask",
    "load_mask": "mask",
    "mask_of_pruned": "mask",
    "save_mask": "mask",
    "load_model": "model.loading",
    "load_tokenizer": "model.loading",
    "calibration_windows": "text",
    "evaluation_windows": "text",
}
__all__ = ["prox_op", "prox_op_", "regularizer", "top2_mask", *_LATER]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"proxsparse.{_LATER[name]}"), name)
    raise AttributeError(f"module 'proxsparse' has no attribute {name!r}")
