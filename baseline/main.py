"""See ``proxsparse/commands/prune.py``, or --help."""

import sys

from proxsparse.commands.prune import main

if __name__ == "__main__":
    sys.exit(main())
