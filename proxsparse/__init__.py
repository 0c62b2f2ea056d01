"""ProxSparse: learn which two of every four weights a pretrained language model keeps.

from proxsparse import prox_op, top2_mask          # the operator, for your own training loop
from proxsparse.learning.trainer import ProxSparseTrainer   # the learning loop on top of TRL's SFTTrainer
proxsparse.load("pruned", sparse=True)             # a pruned model, ready to generate
"""

from typing import Any

from proxsparse.operator.prox import prox_op, prox_op_, regularizer, top2_mask

__version__ = "0.1.0"
__all__ = ["load", "prox_op", "prox_op_", "regularizer", "top2_mask"]


def load(folder: str, *, sparse: bool = False, **options: Any):
    """Load a pruned model for inference: see ``proxsparse.deploy.sparse.load``."""
    from proxsparse.deploy.sparse import (
        load as load_pruned,  # transformers takes seconds to import; the operator needs none
    )

    return load_pruned(folder, sparse=sparse, **options)
