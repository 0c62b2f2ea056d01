#!/usr/bin/env bash
# Set up and run the tests; arguments go to pytest (bash script/test.sh -m "not slow").
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash script/setup.sh
exec .venv/bin/python -m pytest "$@"
