"""ProxSparse: learn which two of every four weights a pretrained language model keeps.

from proxsparse import prox_op, top2_mask          # the operator, for your own training loop
from proxsparse.trainer import ProxSparseTrainer   # the learning loop on top of TRL's SFTTrainer
"""

from proxsparse.prox_op import prox_op, prox_op_, regularizer, top2_mask

__version__ = "0.1.0"
__all__ = ["prox_op", "prox_op_", "regularizer", "top2_mask"]
