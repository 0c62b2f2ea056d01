# What the scripts share; sourced. Sets root (of the repository) and python: from the environment, else an active virtual
# environment's, else .venv's where script/setup.sh made one.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${python:-} ]]; then
    python=python
    [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi
dry_run=0

# arguments WORD...: --dry-run is for us, the others are kept in the array given.
arguments() {
    given=()
    for word in "$@"; do
        if [[ $word == --dry[-_]run ]]; then dry_run=1; else given+=("$word"); fi
    done
}

# flags NAME...: --NAME VALUE of every variable that is set, in the array flags.
flags() {
    flags=()
    local name
    for name in "$@"; do
        [[ -z ${!name:-} ]] || flags+=("--$name" "${!name}")
    done
}

# launcher: how learning starts, in the array launch: one process per GPU where there are several, which
# CUDA_VISIBLE_DEVICES chooses. $accelerate_config is a file such as script/accelerate/fsdp2.yaml.
launcher() {
    launch=("$python")
    local gpus
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if [[ ${device:-} != cpu ]] && ((gpus > 1)); then
        launch+=(-m accelerate.commands.launch --num_processes "$gpus")
        launch+=(${accelerate_config:+--config_file "$accelerate_config"})
    fi
}

# stage TITLE COMMAND...: run a command under its title, or only show it.
stage() {
    printf '\n== %s\n' "$1"
    shift
    if ((dry_run)); then printf '%q ' "$@" && echo; else "$@"; fi
}
