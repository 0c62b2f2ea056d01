#!/usr/bin/env bash
# OpenLLaMA-7B-v2 with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
recipe=openllama-v2-7b-prox
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
