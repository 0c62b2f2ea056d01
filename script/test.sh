#!/usr/bin/env bash
# Set up and run the tests.
#
#   bash script/test.sh          the fast ones, some minutes
#   bash script/test.sh --all    the slow ones too: every recipe start to end, twenty kills, the real model
#
# Other arguments go to pytest as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash script/setup.sh
case ${1:-} in
'') set -- -m "not slow" ;;
--all) shift ;;
esac
# Two workers of one thread: the models are small, and most of the time goes into starting processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
