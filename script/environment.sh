# Sets root (of the repository) and python (the interpreter: from the environment, else an active virtual environment's,
# else .venv's where script/setup.sh made one). Sourced by the scripts that run commands.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${python:-} ]]; then
    python=python
    [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi
