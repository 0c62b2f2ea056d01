"""The operator as a program, and to import from this folder: ``from prox_op import prox_op``.

See ``proxsparse/commands/operator.py``, or --help.
"""

import sys

from proxsparse.commands.operator import main
from proxsparse.operator.prox import prox_op, prox_op_, regularizer, top2_mask

__all__ = ["prox_op", "prox_op_", "regularizer", "top2_mask"]

if __name__ == "__main__":
    sys.exit(main())
