#!/usr/bin/env bash
# Llama-3.1-8B with both regularisers, as published (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
recipe=llama3.1-8b-full
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
