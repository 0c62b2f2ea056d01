#!/usr/bin/env bash
# Mistral-7B-v0.1 with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
recipe=mistral-v0.1-7b-prox
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
