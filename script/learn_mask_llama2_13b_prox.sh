#!/usr/bin/env bash
# Llama-2-13B with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
recipe=llama2-13b-prox
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
