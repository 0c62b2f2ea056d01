"""See ``proxsparse/commands/ppl.py``, or --help."""

import sys

from proxsparse.commands.ppl import main

if __name__ == "__main__":
    sys.exit(main())
