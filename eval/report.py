"""See ``proxsparse/commands/report.py``, or --help."""

import sys

from proxsparse.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
