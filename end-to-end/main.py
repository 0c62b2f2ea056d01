"""See ``proxsparse/commands/learn.py``, or --help."""

import sys

from proxsparse.commands.learn import main

if __name__ == "__main__":
    sys.exit(main())
