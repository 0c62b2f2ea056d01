#!/usr/bin/env bash
# Qwen2.5-14B with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
recipe=qwen2.5-14b-prox
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
