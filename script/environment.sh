# What the scripts share; they source this file. It sets root (the repository's folder) and python. python comes from the
# environment, else from an active virtual environment, else from the .venv that script/setup.sh makes.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${python:-} ]]; then
    python=python
    [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi
dry_run=0

# arguments WORD...: --dry-run sets dry_run, and the other words go into the array given.
arguments() {
    given=()
    for word in "$@"; do
        if [[ $word == --dry[-_]run ]]; then dry_run=1; else given+=("$word"); fi
    done
}

# flags NAME...: puts --NAME VALUE of every variable that is set into the array flags.
flags() {
    flags=()
    local name
    for name in "$@"; do
        [[ -z ${!name:-} ]] || flags+=("--$name" "${!name}")
    done
}

# launcher: puts the command that starts learning into the array launch. With several GPUs it starts one process per GPU;
# CUDA_VISIBLE_DEVICES chooses them. $accelerate_config is a file such as script/accelerate/fsdp2.yaml.
launcher() {
    launch=("$python")
    local gpus
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if [[ ${device:-} != cpu ]] && ((gpus > 1)); then
        launch+=(-m accelerate.commands.launch --num_processes "$gpus")
        launch+=(${accelerate_config:+--config_file "$accelerate_config"})
    fi
}

# stage TITLE COMMAND...: runs a command under its title; with --dry-run it only shows the command.
stage() {
    printf '\n== %s\n' "$1"
    shift
    if ((dry_run)); then printf '%q ' "$@" && echo; else "$@"; fi
}
