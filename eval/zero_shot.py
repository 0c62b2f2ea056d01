"""See ``proxsparse/commands/zero_shot.py``, or --help."""

import sys

from proxsparse.commands.zero_shot import main

if __name__ == "__main__":
    sys.exit(main())
