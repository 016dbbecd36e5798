#!/usr/bin/env bash
# Builds, starts, watches and stops the fine-tuning container.
#
# usage: ./start_docker.sh COMMAND
#
#   start [finetune]        build the image if there is none, start Jupyter Lab, print its address
#   start tensorboard       TensorBoard over results/, on 127.0.0.1:6006
#   start serve [FOLDER]    vLLM's OpenAI-compatible server on 127.0.0.1:8000, for the merged model or
#                           adapter in FOLDER (default: the newest under checkpoints/ and adapters/)
#   run [ARGUMENT...]       all notebooks, headless, in the container: python -m finetune run
#   status [--json]         containers, address, GPU, memory, what is running; exit 0 running, 3 stopped
#   logs [SERVICE] [-f]     the last 200 lines of finetune, tensorboard or serve; -f follows
#   exec COMMAND...         run a command in the container
#   shell                   a shell in the container
#   restart                 stop, then start finetune
#   stop                    stop and remove the containers; files, adapters and checkpoints stay
#   build [finetune] [--no-cache]  build the image again
#   doctor                  check this machine, change nothing
#   help                    this text
#
# Settings come from the environment, then from .env (see .env.example).
#
# exit codes
#    2 usage, settings      10 no docker           16 no NVIDIA runtime      22 no GPU in the container
#    3 not running          11 daemon down         17 port taken             23 too little disk
#   28 rootless, remote     12 no permission       18 base unreachable       24 another checkout's container
#                           13 compose missing     19 build failed           25 docker refused to start or stop it
#                           14 compose too old     20 server unhealthy       26 nothing to serve
#                           15 running as root     21 too little memory      27 no GPU on this machine

set -euo pipefail

root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
env_file=$root/.env
dockerfile=$root/Dockerfile.dgx-spark
image=unsloth-dgx-spark:latest
container=pytorch-finetune
bold='' red='' green='' plain=''
if [[ -t 1 && -t 2 && -z ${NO_COLOR:-} ]]; then bold=$'\e[1m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'; fi

# The comment at the top of this file; for one command, its lines.
cmd_help() { sed -n '2,/^$/ s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
usage_of() { cmd_help | awk -v command="$1" '/^  [a-z]/ { on = $1 == command } /^$/ { on = 0 } on'; }
say() { printf '%s\n' "$*"; }
row() { printf '%s%-12s%s %s\n' "$bold" "$1" "$plain" "$2"; }

# fail CODE WHAT REMEDY: what is wrong and where; what to do about it.
fail() {
  printf '%serror:%s %s\n  %s\n' "$red" "$plain" "$2" "${3//$'\n'/$'\n'  }" >&2
  exit "$1"
}

# compose sees the settings of this script, and reads no .env of its own. Only `start` needs the true token.
compose() {
  JUPYTER_TOKEN=${JUPYTER_TOKEN:-none} docker compose --project-directory "$root" --env-file /dev/null \
    -f "$root/docker-compose-finetune.yml" --profile '*' "$@"
}

running() { [[ $(docker inspect -f '{{.State.Running}}' "$1" 2>/dev/null) == true ]]; }
gpu_visible() { docker exec "$container" nvidia-smi -L >/dev/null 2>&1; }
url() { say "http://127.0.0.1:$JUPYTER_PORT/lab?token=${JUPYTER_TOKEN:-}"; }
# MemAvailable: nvidia-smi has no figure on unified memory. Swap is left out: training that swaps freezes the machine.
memory_gib() { awk -v key="$1:" '$1 == key { printf "%d", $2 / 1048576 }' /proc/meminfo; }
memory() { say "$(memory_gib MemAvailable) GiB available of $(memory_gib MemTotal) GiB"; }
# A hash of everything that decides the image's contents, but for the project, which is mounted.
inputs_hash() { cat "$dockerfile" "$root"/requirements/{base,gpu}.txt | sha256sum | cut -c1-16; }

# Every setting becomes a variable: from the environment, else from .env (its last line), else the default.
load_settings() {
  local pair name value
  # .env as plain NAME=VALUE lines: without BOM, CR, `export`, blanks, comments and quotes. Another user's is not readable.
  written=''
  [[ ! -r $env_file ]] || written=$(LC_ALL=C sed -E "
    1s/^\xEF\xBB\xBF//
    s/^[[:blank:]]*(export[[:blank:]]+)?([A-Z_]+)[[:blank:]]*=[[:blank:]]*/\2=/
    /^[A-Z_]+=[\"']/! s/(^[A-Z_]+=|[[:blank:]])#.*/\1/
    s/[[:space:]]+$//
    s/^([A-Z_]+)=(\"([^\"]*)\"|'([^']*)').*/\1=\3\4/" "$env_file")
  # `sudo -u` may leave the caller's HOME, where this user can write nothing. Not every user has an account.
  [[ -O ${HOME:-/} ]] || HOME=$(getent passwd "$(id -u)" | cut -d: -f6) || HOME=/nonexistent
  for pair in HF_CACHE=\~/.cache/huggingface JUPYTER_TOKEN= JUPYTER_PORT=8888 TENSORBOARD_PORT=6006 SERVE_PORT=8000 \
    MIN_FREE_GIB=24 "BASE_IMAGE=$(sed -n 's/^ARG BASE_IMAGE=//p' "$dockerfile")" VLLM_IMAGE= TRITON= XFORMERS=; do
    name=${pair%%=*}
    value=${!name:-$(sed -n "s/^$name=//p" <<<"$written" | tail -n 1)}
    value=${value:-${pair#*=}}
    # What has no value stays unset, so that docker build and compose take their own defaults.
    if [[ -n $value ]]; then export "$name=$value"; else unset "$name"; fi
  done
  # In .env nobody but us expands ~ and $HOME. A relative path starts at the checkout, as compose has it.
  [[ ! $HF_CACHE =~ ^(~|\$HOME|\$\{HOME\})(/.*)?$ ]] || HF_CACHE=$HOME${BASH_REMATCH[2]}
  HF_CACHE=$(cd "$root" && realpath --canonicalize-missing --no-symlinks "$HF_CACHE")
  HOST_UID=$(id -u) HOST_GID=$(id -g)
  export HOME HOST_UID HOST_GID
}

# ---- checks: each prints one line when all is well, and fails with its own sentence --------------
check_user() {
  ((EUID != 0)) || fail 15 "start_docker.sh is running as root: the files it makes would belong to root." \
    "Run it as your own user. If docker then refuses: sudo usermod -aG docker YOU, and log in again."
  say "uid $EUID"
}

check_settings() {
  local name line
  for name in JUPYTER_PORT TENSORBOARD_PORT SERVE_PORT MIN_FREE_GIB; do
    [[ ${!name} =~ ^[0-9]+$ || $name == MIN_FREE_GIB && ${!name} =~ ^[0-9]+\.[0-9]+$ ]] ||
      fail 2 "$name is '${!name}', which is no valid number." ".env.example shows how it is written."
  done
  line=$(grep -nvE '^([A-Za-z_][A-Za-z0-9_]*=.*|#.*)?$' <<<"$written" | head -n 1) || true
  [[ -z $line ]] || fail 2 "Line ${line%%:*} of .env is no setting: ${line#*:}" "Write NAME=VALUE; .env.example shows how."
  say "from the environment, $env_file and defaults"
}

check_docker() {
  command -v docker || fail 10 "Docker is not installed (no 'docker' on the PATH)." \
    "DGX OS ships it; elsewhere see https://docs.docker.com/engine/install/ubuntu/"
}

check_daemon() {
  local answer where own="Use this machine's own daemon: unset DOCKER_HOST; docker context use default"
  where=${DOCKER_HOST:-$(docker context inspect -f '{{.Endpoints.docker.Host}}' 2>/dev/null)} || where=''
  where=${where:-/var/run/docker.sock} where=${where#unix://}
  # Bounded: a daemon that hangs takes the connection and never answers.
  answer=$(timeout 10 docker version --format '{{.Server.Version}}' 2>&1) || case $answer in
    *"permission denied"*) fail 12 "You may not use Docker: $where refuses $(id -un 2>/dev/null || id -u)." \
      "sudo usermod -aG docker \$USER, then log in again (or: newgrp docker)." ;;
    *) fail 11 "The Docker daemon does not answer at $where." "sudo systemctl start docker; if that fails: journalctl -u docker -n 50" ;;
  esac
  [[ $where == /* ]] || fail 28 "The Docker daemon at $where is on another machine, which cannot mount this checkout." "$own"
  [[ $(docker info -f '{{.SecurityOptions}}') != *name=rootless* ]] ||
    fail 28 "Docker at $where is rootless: the user of its containers is not you, and may not write here." "$own"
  say "Docker engine $answer"
}

check_compose() {
  local version oldest=2.20.0
  version=$(docker compose version --short 2>/dev/null) || fail 13 "Docker has no compose plugin ('docker compose' fails)." \
    "sudo apt-get install docker-compose-plugin (or docker-compose-v2, on Ubuntu's own docker.io)."
  printf '%s\n' "$oldest" "${version#v}" | sort --check=quiet --version-sort ||
    fail 14 "docker compose is ${version#v}; $oldest or newer is needed." "sudo apt-get install --only-upgrade docker-compose-plugin"
  say "docker compose ${version#v}"
}

# check_runtime [FAILED]: what the daemon says of its runtimes, or that it could not start a container with one.
check_runtime() {
  [[ -z ${1:-} && ($(docker info -f '{{json .Runtimes}}') == *'"nvidia"'* || -n $(command -v nvidia-container-runtime-hook)) ]] ||
    fail 16 "Docker cannot hand the GPU to a container: NVIDIA's container runtime is missing or not configured." \
      "sudo apt-get install nvidia-container-toolkit
sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
  say "NVIDIA's container runtime is there"
}

# check_port [VARIABLE]: does anybody else listen there? Docker knows its containers, ss your own programs.
check_port() {
  local name=${1:-JUPYTER_PORT} port listener owner
  port=${!name}
  listener=$(ss -Hltnp "sport = :$port and ( src 127.0.0.1 or src 0.0.0.0 or src [::] )" | head -n 1)
  owner=$(docker ps --filter "publish=$port" --format 'the container {{.Names}}' | head -n 1)
  if [[ -n $listener && $owner != "the container $container" ]]; then
    owner=${owner:-$(sed -nE 's/.*\(\("([^"]+)",pid=([0-9]+).*/\1 (pid \2)/p' <<<"$listener")}
    owner=${owner:-"a process of another user (sudo ss -ltnp 'sport = :$port' names it)"}
    fail 17 "Port $port on 127.0.0.1 is taken by $owner." "Stop that, or choose another port: $name=$((port + 1)) in .env."
  fi
  say "127.0.0.1:$port is ${owner:-free}"
}

# check_disk FOLDER GIB WHAT REMEDY. The folder of a daemon on another machine is not here.
check_disk() {
  local free
  free=$(df -BG --output=avail "$1" 2>/dev/null | tr -dc '0-9') || free=''
  [[ -n $free ]] || { say "unknown: there is no folder $1 on this machine" && return; }
  ((free >= $2)) || fail 23 "Only $free GiB are free in $1; $3 takes $2." "$4"
  say "$free GiB free in $1 ($3 takes $2)"
}

check_image_disk() {
  docker image inspect "$image" >/dev/null 2>&1 && say "the image is built" && return
  # NVIDIA's base image and ours share most of their layers; 40 is both, unpacked.
  check_disk "$(docker info -f '{{.DockerRootDir}}')" 40 "building the image" \
    "docker system df shows what Docker keeps; docker system prune frees what nothing uses."
}
check_model_disk() {
  check_disk "$root/checkpoints" 16 "a full fine-tuning checkpoint" "Delete old checkpoints, or mount a larger disk there."
}

# Where the GPU shares the CPU's memory, nvidia-smi says [N/A] or "Not Supported".
check_GPU() {
  local gpu
  gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader 2>/dev/null) ||
    fail 27 "nvidia-smi finds no GPU on this machine." \
      "Run nvidia-smi to see its reason; load the driver (sudo modprobe nvidia), or reboot after a driver update."
  [[ $gpu == *MiB ]] || gpu="${gpu%, *}, memory shared with the CPU"
  [[ $gpu == *", 12.1, "* ]] || gpu+=" (not the DGX Spark's 12.1, for which the image is compiled)"
  say "$gpu"
}

check_memory() {
  awk "BEGIN { exit !($(memory_gib MemAvailable) >= $MIN_FREE_GIB) }" ||
    fail 21 "Only $(memory_gib MemAvailable) GiB of memory are available; at least $MIN_FREE_GIB GiB are needed, or the machine may freeze." \
      "Stop other programs, or drop the page cache: sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'
docs/speed.md predicts the memory of each method. A smaller limit: MIN_FREE_GIB=12 in .env."
  say "$(memory) (at least $MIN_FREE_GIB)"
}

# ---- the image, and what runs in it -------------------------------------------------------------
ensure_pulled() {
  docker image inspect "$1" >/dev/null 2>&1 && return
  docker pull "$1" || fail 18 "The image $1 is not here and cannot be pulled (docker's reason is above)." \
    "Check the network and the name; nvcr.io answers without an account: curl -I https://nvcr.io/v2/"
}

cmd_build() {
  local log said options
  ensure_pulled "$BASE_IMAGE"
  mapfile -t options < <(sed -nE 's/^(unsloth|trl|peft|transformers)==/--label=finetune.\1=/p' "$root"/requirements/{base,gpu}.txt)
  [[ $* != *--no-cache* ]] || options+=(--no-cache)
  log=$(mktemp "${TMPDIR:-/tmp}/finetune-build.XXXXXX")
  say "Building $image on $BASE_IMAGE; the whole log is in $log"
  # An argument without a value is taken from the environment, or not at all.
  docker build -f "$dockerfile" -t "$image" --build-arg HOST_UID --build-arg HOST_GID --build-arg BASE_IMAGE \
    --build-arg TRITON --build-arg XFORMERS --label "finetune.inputs=$(inputs_hash)" "${options[@]}" \
    --build-arg "GIT_COMMIT=$(env -u GIT_DIR -u GIT_WORK_TREE git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || say unknown)" \
    "$root" 2>&1 | tee "$log" | sed -u -nE '/^(Step |#[0-9]+ \[)/ { s/^(.{96}).*/\1 .../; p }' || {
    # BuildKit repeats what the failed step said under a rule of dashes, before a long excerpt of the Dockerfile.
    said=$(sed -n '/^ > \[/,/^------$/p' "$log" | tail -n 15)
    fail 19 "The image did not build; no image was tagged. The last lines of $log:" "${said:-$(tail -n 15 "$log")}${said:+$'\n'$(tail -n 1 "$log")}"
  }
  say "Built $image"
}

ensure_image() {
  local built labels='{{with .Config.Labels}}{{index . "finetune.host-uid"}} {{index . "finetune.inputs"}}{{end}}'
  built=$(docker image inspect -f "$labels" "$image" 2>/dev/null) || built=none
  case $built in
    "$HOST_UID $(inputs_hash)") return ;;
    "$HOST_UID "*) say "Note: Dockerfile.dgx-spark or requirements/ changed since the image was built: ./start_docker.sh build" && return ;;
    none) say "There is no image yet; the first build takes some minutes." ;;
    *) say "The image was built for uid ${built% *}; its last layers are rebuilt for yours, $HOST_UID." ;;
  esac
  cmd_build finetune
}

# up SERVICE SECONDS: create the container, unless it runs, and wait for so long until its server answers.
up() {
  local answer name=pytorch-$1 mode=--force-recreate
  ! running "$name" || mode=--no-recreate
  # The folder must exist: Docker would create it, but as root's.
  mkdir -p "$HF_CACHE" 2>/dev/null || fail 2 "You may not make the folder $HF_CACHE." "Name another: HF_CACHE=/data/huggingface in .env"
  answer=$(compose up --wait --wait-timeout "$2" --no-build "$mode" "${1/#finetune/$container}" 2>&1) && return
  [[ $answer != *"could not select device driver"* ]] || check_runtime failed
  [[ $(docker inspect -f '{{.State.StartedAt}}' "$name" 2>/dev/null) == 2* ]] || fail 25 "Docker could not start $name:" "$answer"
  fail 20 "$name is not healthy. The last lines of its log:" "$(docker logs --tail 15 "$name" 2>&1)
Health check: $(docker inspect -f '{{range .State.Health.Log}}{{println .Output}}{{end}}' "$name" | tail -n 2 | head -c 300)
Then: ./start_docker.sh restart; the whole log: ./start_docker.sh logs $1"
}

# Two checkouts share the container's name; starting here must not end a training run started there.
check_checkout() {
  local other
  other=$(docker inspect -f '{{range .Mounts}}{{if eq .Destination "/workspace"}}{{.Source}}{{end}}{{end}}' "$container" 2>/dev/null) || return 0
  [[ $other == "$root" ]] || ! running "$container" ||
    fail 24 "$container is running for another checkout: $other" "Stop it there first: '$other/start_docker.sh' stop"
}

start_finetune() {
  check_checkout
  # Never in an argument list, where `ps` shows it to everybody. The new line comes after the user's, and so it counts.
  if [[ -z ${JUPYTER_TOKEN:-} ]]; then
    JUPYTER_TOKEN=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
    touch "$env_file" && chmod 600 "$env_file"
    printf '\n# By start_docker.sh; whoever has it can run code as you.\nJUPYTER_TOKEN=%s\n' "$JUPYTER_TOKEN" >>"$env_file"
  fi
  # `systemctl daemon-reload` on the host takes the GPU from running containers.
  if running "$container" && ! gpu_visible; then
    say "$container has lost its GPU; we make a new container."
    compose rm --stop --force "$container" >/dev/null 2>&1
  fi
  ! running "$container" || say "$container is already running."
  running "$container" || { check_port >/dev/null && check_memory >/dev/null && ensure_image; }
  up finetune 120
  gpu_visible || fail 22 "$container runs, but sees no GPU: nvidia-smi fails in it." \
    "If nvidia-smi works on the host: sudo systemctl restart docker, then ./start_docker.sh restart"
  row "Jupyter Lab" "$(url)"
  row "remotely" "ssh -N -L $JUPYTER_PORT:127.0.0.1:$JUPYTER_PORT ${USER:-you}@$(hostname), then open the same address"
  row "mounts" "$root -> /workspace"
  row "" "$HF_CACHE -> /home/trainer/.cache/huggingface"
  row "memory" "$(memory)"
}

start_tensorboard() {
  running pytorch-tensorboard || check_port TENSORBOARD_PORT >/dev/null
  ensure_image
  up tensorboard 120
  row "TensorBoard" "http://127.0.0.1:$TENSORBOARD_PORT"
}

# json FILE NAME: a value of a file with a line for each, as peft and our records are written.
json() { sed -nE "s/^ *\"$2\": *\"?([^\",]*)\"?,?$/\1/p" "$1" | head -n 1; }

# check_record FOLDER: fails unless the artefact in it is the one that its training or merging recorded, and sets `record`.
# The digest is that of finetune/files.py. What is in results/reference was trained elsewhere.
check_record() {
  local digest records
  mapfile -t records < <(grep -rlF --include={record,merged}.json --exclude-dir=reference "\"artefact\": \"$1\"" "$root/results")
  record=''
  ((${#records[@]})) || return 0
  digest=$(cd "$root/$1" && find -L . -type f -not -path '*/.*' -not -path ./README.md -printf '%P\n' | LC_ALL=C sort |
    xargs -d '\n' sha256sum | sha256sum | cut -c1-12)
  record=$(grep -lF "\"artefact_digest\": \"$digest\"" "${records[@]}" | head -n 1) ||
    fail 26 "$1 is not the one that ${records[0]#"$root"/} describes." "Train or merge it again."
}

# adapter_arguments FOLDER: sets SERVE_ARGS for an adapter on its base, or fails where vLLM would make another model of it.
adapter_arguments() {
  local config=$root/$1/adapter_config.json base rank largest merging="Merge it, and serve the folder that this makes:
./start_docker.sh exec python -m finetune merge ${record:+$(json "$record" run) --profile $(json "$record" profile)}"
  [[ -z $record ]] || ! grep -q '"load_in_4bit": true' "$record" ||
    fail 26 "$1 was trained on the base in 4 bits, and vLLM would put it on the 16-bit one, which is another model." "$merging"
  [[ $(json "$config" task_type) != SEQ_CLS ]] ||
    fail 26 "$1 has a classification head, which writes no text." "Load it by the lines of $1/README.md."
  [[ $(json "$config" use_dora) != true ]] || fail 26 "$1 is a DoRA adapter, which vLLM cannot serve." "$merging"
  base=$(json "$config" base_model_name_or_path)
  # In the container, the checkout is /workspace.
  if [[ $base == "$root"/* || -d $root/$base ]]; then base=/workspace/${base#"$root"/}; fi
  [[ $base != /* || ($base == /workspace/* && -d $root/${base#/workspace/}) ]] ||
    fail 26 "The base model of $1 is $base, and the container has no such folder." "$merging"
  rank=$({ json "$config" r && sed -nE '/"rank_pattern"/,/\}/s/.*: *([0-9]+),?$/\1/p' "$config"; } | sort -n | tail -n 1)
  # The ranks that vLLM knows.
  for largest in 8 16 32 64 128 256 320 512; do ((largest < rank)) || break; done
  ((rank <= largest)) || fail 26 "$1 has rank $rank, and vLLM serves adapters of rank 512 at most." "$merging"
  export SERVE_ARGS="$base --enable-lora --max-lora-rank $largest --lora-modules tuned=/workspace/$1"
}

start_serve() {
  local folder=${1:-} record
  if running pytorch-serve; then
    say "pytorch-serve is already running; to serve another folder, ./start_docker.sh stop first."
  else
    # The newest, one level down: checkpoints/.training holds the states of unfinished runs.
    [[ -n $folder ]] || folder=$(cd "$root" && find checkpoints adapters -mindepth 2 -maxdepth 2 \
      \( -name config.json -o -name adapter_config.json \) -printf '%T@ %h\n' | sort -rn | head -n 1 | cut -d' ' -f2-)
    folder=${folder#"$root"/} folder=${folder#./} folder=${folder%/}
    [[ -e $root/$folder/config.json || -e $root/$folder/adapter_config.json ]] ||
      fail 26 "There is no model to serve in ${folder:-checkpoints/ or adapters/}." \
        "A folder with config.json (merged model) or adapter_config.json (adapter) is needed: train one first."
    check_record "$folder"
    [[ -n $record ]] || say "Note: no record in results/ describes $folder, so nothing here knows whether it was trained in 4 bits, or changed."
    # An adapter is served on top of its base, a merged model as it is.
    export SERVE_ARGS="/workspace/$folder --served-model-name tuned"
    [[ ! -e $root/$folder/adapter_config.json ]] || adapter_arguments "$folder"
    check_port SERVE_PORT >/dev/null && check_memory >/dev/null
    ensure_pulled "$(compose config --images serve)"
    say "Serving $folder; loading takes some minutes."
  fi
  up serve 1200
  row "vLLM" "http://127.0.0.1:$SERVE_PORT/v1 (model: tuned)"
}

# ---- commands -----------------------------------------------------------------------------------
cmd_start() { "start_${1:-finetune}" "${@:2}"; }
cmd_restart() { check_checkout && cmd_stop && start_finetune; }
cmd_shell() { cmd_exec bash; }

cmd_run() {
  start_finetune
  cmd_exec python -m finetune run --profile spark "$@"
}

cmd_exec() {
  local tty=()
  running "$container" || fail 3 "$container is not running." "./start_docker.sh start finetune"
  # A terminal inside only where there is one outside: cron and scripts have none.
  [[ ! -t 0 || ! -t 1 ]] || tty=(--tty)
  docker exec --interactive "${tty[@]}" "$container" "$@"
}

cmd_stop() {
  local answer
  answer=$(compose down --remove-orphans --timeout 20 2>&1) || fail 25 "Docker could not stop the containers:" "$answer"
  say "Stopped. Files, adapters and checkpoints are where they were."
}

cmd_logs() {
  local service=$container follow=()
  [[ ! $* =~ tensorboard|serve ]] || service=${BASH_REMATCH[0]}
  [[ $* != *-f* ]] || follow=(--follow)
  [[ -n $(compose ps --all --quiet "$service") ]] ||
    fail 3 "$service has no container, and so no log." "./start_docker.sh status shows what there is."
  compose logs --tail 200 "${follow[@]}" "$service"
}

cmd_status() {
  local up=false health=none gpu='' name text
  # Asked inside, where the token is in the environment. A server that does not answer has nothing to tell of.
  activity() { docker exec "$container" python -I /workspace/finetune/activity.py "$1" 2>/dev/null; }
  containers() { docker ps --all --filter label=com.docker.compose.project=dgx-spark-finetune --format "$1"; }
  if running "$container"; then
    up=true health=$(docker inspect -f '{{.State.Health.Status}}' "$container")
    gpu=$(docker exec "$container" nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits 2>/dev/null) || gpu=''
  fi
  if [[ ${1:-} == --json ]]; then
    # The token stays out of the JSON, which scripts log; it is in .env.
    printf '{"running": %s, "health": "%s", "url": "http://127.0.0.1:%s/lab", "gpu_percent": %s, "mem_available_gib": %s, "containers": [%s], "activity": %s}\n' \
      $up "$health" "$JUPYTER_PORT" "${gpu:-null}" "$(memory_gib MemAvailable)" \
      "$(containers '{"name": {{json .Names}}, "state": {{json .State}}, "status": {{json .Status}}}' | paste -sd,)" "$(activity json || say '[]')"
  else
    text=$(containers '{{.Names}}: {{.State}} ({{.Status}})')
    while read -r text; do row "container" "$text"; done <<<"${text:-none: ./start_docker.sh start finetune}"
    if $up; then
      row "Jupyter Lab" "$(url)"
      row "GPU" "${gpu:-not visible in the container: ./start_docker.sh start finetune makes a new container}${gpu:+ % busy}"
    fi
    row "memory" "$(memory)"
    activity text | while IFS='|' read -r name text; do row "$name" "$text"; done || true
  fi
  $up || exit 3
}

# Every check in a subshell, so that one failure does not hide the next. The exit code is the first one's.
cmd_doctor() {
  local check code mark answer first=0 daemon=0
  for check in user settings docker daemon compose runtime port image_disk GPU memory model_disk; do
    # Without a daemon, what only it knows would fail for no reason of its own.
    [[ ! $check =~ ^(compose|runtime|port|image_disk)$ ]] || ((daemon == 0)) || continue
    code=0 mark="${green}ok$plain  "
    answer=$(red='' plain='' "check_$check" 2>&1) || code=$?
    [[ $check != daemon ]] || daemon=$code
    if ((code)); then mark="${red}FAIL$plain" first=${first/#0/$code}; fi
    printf '%s  %-12s %s\n' "$mark" "${check/_/ }" "${answer#error: }"
  done
  exit "$first"
}

# What each command takes. Anything else is refused, before it does something else than was meant.
declare -A words=([start]='(finetune|tensorboard|serve( [^ ]+)?)?' [run]='.*' [status]='(--json)?' [exec]='.+'
  [logs]='((finetune|tensorboard|serve|-f|--follow) ?)*' [build]='((finetune|--no-cache) ?)*'
  [shell]='' [restart]='' [stop]='' [doctor]='' [help]='')

main() {
  local command=${1:-help} check checks='docker daemon compose'
  [[ ! $command =~ ^(-h|--help)$ ]] || command=help
  (($#)) || fail 2 "A command is missing." "$(cmd_help)"
  [[ -n ${words[$command]+known} ]] || fail 2 "There is no command '$command'." "$(cmd_help)"
  [[ ${*:2} =~ ^${words[$command]}$ ]] || fail 2 "There is no command '$*'. Use one of:" "$(usage_of "$command")"
  [[ ! $command =~ ^(help|doctor)$ ]] || checks=''
  [[ ! $command =~ ^(start|restart|run|build)$ ]] || checks="user settings $checks"
  load_settings
  for check in $checks; do "check_$check" >/dev/null; done
  "cmd_$command" "${@:2}"
}

main "$@"
