"""See ``proxsparse/commands/apply.py``, or --help."""

import sys

from proxsparse.commands.apply import main

if __name__ == "__main__":
    sys.exit(main())
