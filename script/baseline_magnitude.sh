#!/usr/bin/env bash
# Prune to 2:4 by magnitude. script/baseline.sh says how to call it.
prune_method=magnitude
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
