#!/usr/bin/env bash
# Llama-3.1-8B with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
recipe=llama3.1-8b-prox
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
