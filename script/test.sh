#!/usr/bin/env bash
# Set up and run the tests.
#
#   bash script/test.sh              the fast ones, some minutes
#   bash script/test.sh --all        the slow ones too: scripts from start to end, runs that are killed, the real model
#   bash script/test.sh -k mask      of the fast ones, those with mask in their names
#
# Other arguments go to pytest as they are. Slow tests run with --all, or where you choose by a marker yourself (-m slow).
# -n 0 puts all tests into one process, which --pdb and -s need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
chosen=(-m "not slow")
arguments=()
for argument in "$@"; do
    case $argument in
    --all) chosen=() ;;
    -m | -m?*) chosen=() arguments+=("$argument") ;;
    *) arguments+=("$argument") ;;
    esac
done
bash script/setup.sh
# Two processes share the cores, because the tests' models are too small to use all cores in one process. A process that is
# done takes over tests of the other.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}
exec .venv/bin/python -m pytest -n 2 --dist worksteal --durations 10 ${chosen[@]+"${chosen[@]}"} ${arguments[@]+"${arguments[@]}"}
