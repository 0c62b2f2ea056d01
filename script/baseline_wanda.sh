#!/usr/bin/env bash
# Prune to 2:4 with Wanda. script/baseline.sh says how to call it.
prune_method=wanda
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
