"""See ``proxsparse/commands/extract.py``, or --help."""

import sys

from proxsparse.commands.extract import main

if __name__ == "__main__":
    sys.exit(main())
