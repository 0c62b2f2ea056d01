#!/usr/bin/env bash
# Create .venv and install the pinned environment. The second time it installs only what has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed.sha256
wanted=$(cat requirement.txt pyproject.toml script/embedded.txt | sha256sum)
if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    exit 0
fi

python=${PYTHON:-}
for candidate in python3.11 python3.12 python3.13 python3; do
    [[ -n $python ]] && break
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$candidate
    fi
done
if [[ -z $python ]]; then
    echo "error: Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python bash script/setup.sh" >&2
    exit 1
fi

echo "setting up .venv with $("$python" --version) (some minutes, once)"
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirement.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r script/embedded.txt
echo "$wanted" >"$stamp"
