"""See ``proxsparse/commands/eval.py``, or --help."""

import sys

from proxsparse.commands.eval import main

if __name__ == "__main__":
    sys.exit(main())
