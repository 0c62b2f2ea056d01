"""See ``proxsparse/commands/mask_ppl.py``, or --help."""

import sys

from proxsparse.commands.mask_ppl import main

if __name__ == "__main__":
    sys.exit(main())
