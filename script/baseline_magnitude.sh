#!/usr/bin/env bash
# Magnitude pruning to 2:4. Use: see script/baseline.sh.
prune_method=magnitude
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
