#!/usr/bin/env bash
# Wanda, 2:4. Use: see script/baseline.sh.
prune_method=wanda
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
