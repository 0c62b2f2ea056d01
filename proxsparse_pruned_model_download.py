"""See ``proxsparse/commands/download.py``, or --help."""

import sys

from proxsparse.commands.download import main

if __name__ == "__main__":
    sys.exit(main())
