"""The commands: each parses arguments, calls the library, prints and writes a record. Scripts only forward to them."""

import logging

# transformers imports bitsandbytes where it is installed, which then misses a package that only its own products need.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
