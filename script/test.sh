#!/usr/bin/env bash
# Set up and run the tests.
#
#   bash script/test.sh          the fast ones, some minutes
#   bash script/test.sh --all    the slow ones too: every recipe from start to end, twenty kills, the real model
#
# Other arguments go to pytest as they are. -n 0 puts all tests into one process, which --pdb and -s need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash script/setup.sh
case ${1:-} in
'') set -- -m "not slow" ;;
--all) shift ;;
esac
# Two processes share the cores, because the tests' models are too small to use all cores in one process. A process that is
# done takes over tests of the other.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}
exec .venv/bin/python -m pytest -n 2 --dist worksteal --durations 10 "$@"
