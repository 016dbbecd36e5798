#!/usr/bin/env bash
# Builds, starts, watches and stops the fine-tuning container. `./start_docker.sh help` lists the commands.
set -euo pipefail

root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
env_file=$root/.env
dockerfile=$root/Dockerfile.dgx-spark
project=dgx-spark-finetune
image=unsloth-dgx-spark:latest
container=pytorch-finetune
min_compose=2.20.0
start_timeout=120
serve_timeout=1200
# NVIDIA's base image and ours share most of their layers; this is both, unpacked.
image_gib=40
checkpoint_gib=16

usage() {
  cat <<'USAGE'
usage: ./start_docker.sh COMMAND

  start [finetune]        build the image if there is none, start Jupyter Lab, print its address
  start tensorboard       TensorBoard over results/, on 127.0.0.1:6006
  start serve [FOLDER]    vLLM's OpenAI-compatible server on 127.0.0.1:8000, for the merged model or
                          adapter in FOLDER (default: the newest under checkpoints/ and adapters/)
  run [ARGUMENT...]       the whole suite, headless, in the container: python -m finetune run
  status [--json]         containers, address, GPU, memory, what is running; exit 0 running, 3 stopped
  logs [SERVICE] [-f]     the last 200 lines of finetune, tensorboard or serve; -f follows
  exec COMMAND...         run a command in the container
  shell                   a shell in the container
  restart                 stop, then start finetune
  stop                    stop and remove the containers; files, adapters and checkpoints stay
  build [finetune] [--no-cache]
                          build the image again
  doctor                  check this machine, change nothing
  help                    this text

Settings come from the environment, then from .env (see .env.example).

exit codes
   2 usage            10 no docker           16 no NVIDIA runtime      22 no GPU in the container
   3 not running      11 daemon down         17 port taken             23 too little disk
                      12 no permission       18 base unreachable       24 another checkout's container
                      13 compose missing     19 build failed           25 docker refused to start or stop it
                      14 compose too old     20 server unhealthy       26 nothing to serve
                      15 running as root     21 too little memory      27 no GPU on this machine
USAGE
}

# ---- small tools --------------------------------------------------------------------------------

bold='' red='' green='' yellow='' plain=''
if [[ -t 1 && -t 2 && -z ${NO_COLOR:-} ]]; then
  bold=$'\e[1m' red=$'\e[31m' green=$'\e[32m' yellow=$'\e[33m' plain=$'\e[0m'
fi

say() { printf '%s\n' "$*"; }

row() { printf '%s%-12s%s %s\n' "$bold" "$1" "$plain" "$2"; }

# fail CODE WHAT REMEDY: what is wrong and where; what to do about it.
fail() {
  printf '%serror:%s %s\n' "$red" "$plain" "$2" >&2
  printf '%s\n' "$3" | sed 's/^/  /' >&2
  exit "$1"
}

# The environment, then .env, then the default: the order in which docker compose itself reads them.
setting() {
  local name=$1 default=$2 line=''
  if [[ -n ${!name:-} ]]; then
    line=$name=${!name}
  elif [[ -e $env_file ]]; then
    line=$(sed -n "s/^$name=/&/p" "$env_file" | head -n 1)
  fi
  line=${line#*=}
  # Quotes are the file's, not the value's.
  if [[ $line =~ ^\"(.*)\"$ || $line =~ ^\'(.*)\'$ ]]; then line=${BASH_REMATCH[1]}; fi
  printf '%s\n' "${line:-$default}"
}

# The candidate nearest to WORD, if no more than two edits away (Levenshtein).
nearest() {
  printf '%s\n' "${@:2}" | awk -v word="$1" '
    function least(a, b, c) { return a < b ? (a < c ? a : c) : (b < c ? b : c) }
    {
      for (i = 0; i <= length(word); i++) edits[i, 0] = i
      for (j = 0; j <= length($0); j++) edits[0, j] = j
      for (i = 1; i <= length(word); i++)
        for (j = 1; j <= length($0); j++)
          edits[i, j] = least(edits[i - 1, j] + 1, edits[i, j - 1] + 1,
                              edits[i - 1, j - 1] + (substr(word, i, 1) != substr($0, j, 1)))
      found = edits[length(word), length($0)]
      if (found <= 2 && (best == "" || found < fewest)) { best = $0; fewest = found }
    }
    END { print best }'
}

# unknown KIND WORD CANDIDATE...: refuse a word, with a suggestion.
unknown() {
  local guess
  guess=$(nearest "$2" "${@:3}")
  [[ -z $guess ]] || guess=" Did you mean '$guess'?"
  fail 2 "There is no $1 '$2'.$guess" "./start_docker.sh help lists them all."
}

# all_read WORD...: refuse what a command has no use for, before it does something else than was meant.
all_read() { (($# == 0)) || fail 2 "'$1' is one word too many." "./start_docker.sh help shows what each command takes."; }

compose() { docker compose --project-directory "$root" -f "$root/docker-compose-finetune.yml" "$@"; }

service_name() {
  case $1 in
    finetune) say "$container" ;;
    tensorboard | serve) say "$1" ;;
    *) unknown service "$1" finetune tensorboard serve ;;
  esac
}

running() { [[ $(docker inspect -f '{{.State.Running}}' "$1" 2>/dev/null) == true ]]; }

gpu_visible() { docker exec "$container" nvidia-smi -L >/dev/null 2>&1; }

# MemAvailable, not nvidia-smi (which has no figure on unified memory) and not torch.cuda.mem_get_info
# (which counts the page cache as used). Swap is left out: training that swaps freezes the machine.
memory_gib() { awk -v key="$1:" '$1 == key { printf "%d", $2 / 1048576 }' /proc/meminfo; }

disk_gib() { df -BG --output=avail "$1" | tr -dc '0-9'; }

# A hash of everything that decides the image's contents, but for the project, which is mounted.
inputs_hash() { cat "$dockerfile" "$root"/requirements/{base,gpu}.txt | sha256sum | cut -c1-16; }

image_label() { docker image inspect -f "{{index .Config.Labels \"$1\"}}" "$image"; }

# ---- settings -----------------------------------------------------------------------------------

load_settings() {
  # `sudo -u` may leave the caller's HOME, where this user can write nothing.
  if [[ ! -O ${HOME:-/} ]]; then HOME=$(getent passwd "$(id -u)" | cut -d: -f6); fi
  HOST_UID=$(id -u)
  HOST_GID=$(id -g)
  HF_CACHE=$(setting HF_CACHE "$HOME/.cache/huggingface")
  JUPYTER_PORT=$(setting JUPYTER_PORT 8888)
  TENSORBOARD_PORT=$(setting TENSORBOARD_PORT 6006)
  SERVE_PORT=$(setting SERVE_PORT 8000)
  # Compose wants a value for every command; only `start` needs the true one, and generates it.
  JUPYTER_TOKEN=$(setting JUPYTER_TOKEN none)
  export HOME HOST_UID HOST_GID HF_CACHE JUPYTER_PORT TENSORBOARD_PORT SERVE_PORT JUPYTER_TOKEN
}

# The token never appears in an argument list, where `ps` would show it to every user of the machine.
ensure_token() {
  if [[ $JUPYTER_TOKEN == none ]]; then
    JUPYTER_TOKEN=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
    (umask 077 && printf '\n# Generated by start_docker.sh; whoever has it can run code as you.\nJUPYTER_TOKEN=%s\n' \
      "$JUPYTER_TOKEN" >>"$env_file")
    chmod 600 "$env_file"
  fi
}

url() { say "http://127.0.0.1:$JUPYTER_PORT/lab?token=$JUPYTER_TOKEN"; }

# ---- checks: each prints one line when all is well, and fails with its own sentence --------------

check_user() {
  ((EUID != 0)) || fail 15 "start_docker.sh is running as root: the files it makes would belong to root." \
    "Run it as your own user. If docker then refuses: sudo usermod -aG docker YOU, and log in again."
  say "uid $EUID"
}

check_docker() {
  command -v docker >/dev/null || fail 10 "Docker is not installed (no 'docker' on the PATH)." \
    "DGX OS ships it; elsewhere see https://docs.docker.com/engine/install/ubuntu/"
  say "$(command -v docker)"
}

check_daemon() {
  local answer
  # Bounded: a daemon that hangs takes the connection and never answers.
  if ! answer=$(timeout 10 docker version --format '{{.Server.Version}}' 2>&1); then
    case $answer in
      *"permission denied"*) fail 12 "You may not use Docker: ${DOCKER_HOST:-/var/run/docker.sock} refuses $(id -un 2>/dev/null || id -u)." \
        "sudo usermod -aG docker \$USER, then log in again (or: newgrp docker)." ;;
      *) fail 11 "The Docker daemon does not answer at ${DOCKER_HOST:-/var/run/docker.sock}." \
        "sudo systemctl start docker; if that fails: journalctl -u docker -n 50" ;;
    esac
  fi
  say "Docker engine $answer"
}

check_compose() {
  local version
  version=$(docker compose version --short 2>/dev/null) || fail 13 "Docker has no compose plugin ('docker compose' fails)." \
    "sudo apt-get install docker-compose-plugin (or docker-compose-v2, on Ubuntu's own docker.io)."
  version=${version#v}
  [[ $(printf '%s\n' "$min_compose" "$version" | sort -V | head -n 1) == "$min_compose" ]] ||
    fail 14 "docker compose is $version; $min_compose is the oldest that will do." \
      "sudo apt-get install --only-upgrade docker-compose-plugin"
  say "docker compose $version"
}

no_runtime() {
  fail 16 "Docker cannot hand the GPU to a container: NVIDIA's container runtime is missing or not configured." \
    "sudo apt-get install nvidia-container-toolkit
sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
}

check_runtime() {
  if docker info -f '{{json .Runtimes}}' | grep -q '"nvidia"'; then
    say "runtime 'nvidia' registered"
  elif command -v nvidia-container-runtime-hook >/dev/null; then
    say "$(command -v nvidia-container-runtime-hook)"
  else
    no_runtime
  fi
}

check_gpu() {
  local gpu
  gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>/dev/null) ||
    fail 27 "nvidia-smi finds no GPU on this machine." \
      "Run nvidia-smi to see its reason; load the driver (sudo modprobe nvidia), or reboot after a driver update."
  case $gpu in
    *", 12.1") say "$gpu" ;;
    *) say "${yellow}$gpu, not the DGX Spark's 12.1: the image is compiled for that one$plain" ;;
  esac
}

check_unified() {
  local total
  total=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader 2>/dev/null) || total=''
  case $total in
    '') say "unknown without a GPU" ;;
    *N/A* | *"Not Supported"*) say "yes: $(memory_gib MemTotal) GiB shared by CPU and GPU" ;;
    *) say "no: the GPU has $total of its own, the host $(memory_gib MemTotal) GiB" ;;
  esac
}

check_memory() {
  local floor free
  floor=$(setting MIN_FREE_GIB 24)
  free=$(memory_gib MemAvailable)
  ((free >= floor)) || fail 21 "Only $free GiB of memory are available; at least $floor GiB are needed, or the machine may freeze." \
    "Stop other programs, or drop the page cache: sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'
QLoRA needs about 12 GiB, LoRA 25, full fine-tuning 70. Another floor: MIN_FREE_GIB=12 in .env."
  say "$free GiB available of $(memory_gib MemTotal) GiB (floor: $floor)"
}

check_image_disk() {
  local folder free
  folder=$(docker info -f '{{.DockerRootDir}}')
  free=$(disk_gib "$folder")
  if docker image inspect "$image" >/dev/null 2>&1; then
    say "the image is built; $free GiB free in $folder"
    return
  fi
  ((free >= image_gib)) || fail 23 "Only $free GiB are free in $folder; building the image takes $image_gib." \
    "docker system df shows what Docker keeps; docker system prune frees what nothing uses."
  say "$free GiB free in $folder (the image takes $image_gib)"
}

check_checkpoint_disk() {
  local folder=$root/checkpoints free
  free=$(disk_gib "$folder")
  ((free >= checkpoint_gib)) || fail 23 "Only $free GiB are free in $folder; a full fine-tuning checkpoint takes $checkpoint_gib." \
    "Delete old checkpoints, or mount a larger disk there."
  say "$free GiB free in $folder (a checkpoint takes $checkpoint_gib)"
}

# Who listens on 127.0.0.1:PORT? A process of another user shows no name here.
port_owner() {
  local owner
  owner=$(docker ps --filter "publish=$1" --format 'the container {{.Names}}')
  [[ -n $owner ]] || owner=$(ss -Hltnp "sport = :$1" | sed -nE 's/.*users:\(\("([^"]+)",pid=([0-9]+).*/\1 (pid \2)/p' | head -n 1)
  [[ -n $owner ]] || owner="a process of another user (sudo ss -ltnp 'sport = :$1' names it)"
  say "$owner"
}

# Bash ends with 1 if nobody listens. A listener that accepts nobody would let us wait for minutes.
port_taken() {
  local code=0
  timeout 3 bash -c "exec 3<>/dev/tcp/127.0.0.1/$1" 2>/dev/null || code=$?
  ((code != 1))
}

# check_port PORT VARIABLE
check_port() {
  if port_taken "$1"; then
    fail 17 "Port $1 on 127.0.0.1 is taken by $(port_owner "$1")." \
      "Stop that, or choose another port: $2=$(($1 + 1)) in .env."
  fi
  say "127.0.0.1:$1 is free"
}

check_jupyter_port() {
  if running "$container"; then
    say "127.0.0.1:$JUPYTER_PORT is ours: Jupyter Lab is running"
  else
    check_port "$JUPYTER_PORT" JUPYTER_PORT
  fi
}

# Two checkouts share the container's name; starting here must not end a training run started there.
check_checkout() {
  local other
  other=$(docker inspect -f '{{range .Mounts}}{{if eq .Destination "/workspace"}}{{.Source}}{{end}}{{end}}' "$container" 2>/dev/null) || return 0
  [[ $other == "$root" ]] || ! running "$container" ||
    fail 24 "$container is running for another checkout: $other" "Stop it there first: '$other/start_docker.sh' stop"
}

preflight() {
  check_docker >/dev/null
  check_daemon >/dev/null
  check_compose >/dev/null
  load_settings
}

# ---- the image ----------------------------------------------------------------------------------

ensure_pulled() {
  docker image inspect "$1" >/dev/null 2>&1 && return
  say "Pulling $1"
  docker pull "$1" || fail 18 "The image $1 is not here and cannot be pulled (docker's reason is above)." \
    "Check the network and the name; nvcr.io answers without an account: curl -I https://nvcr.io/v2/"
}

# What the step that failed said. BuildKit repeats it under a rule of dashes, before a long excerpt of the Dockerfile.
build_error() {
  local said
  said=$(sed -n '/^ > \[/,/^------$/p' "$1" | tail -n 15)
  if [[ -n $said ]]; then
    printf '%s\n' "$said" "$(tail -n 1 "$1")"
  else
    tail -n 15 "$1"
  fi
}

build() {
  local base commit log pin build_args=(--build-arg "HOST_UID=$HOST_UID" --build-arg "HOST_GID=$HOST_GID")
  base=$(setting BASE_IMAGE "$(sed -n 's/^ARG BASE_IMAGE=//p' "$dockerfile")")
  ensure_pulled "$base"
  commit=$(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || say unknown)
  for pin in unsloth trl peft transformers; do
    build_args+=(--label "finetune.$pin=$(sed -n "s/^$pin==//p" "$root"/requirements/{base,gpu}.txt)")
  done
  for pin in TRITON XFORMERS; do
    [[ -z $(setting $pin '') ]] || build_args+=(--build-arg "$pin=$(setting $pin '')")
  done
  log=$(mktemp "${TMPDIR:-/tmp}/finetune-build.XXXXXX")
  say "Building $image on $base; the whole log is in $log"
  docker build -f "$dockerfile" -t "$image" --build-arg "BASE_IMAGE=$base" --build-arg "GIT_COMMIT=$commit" \
    "${build_args[@]}" --label "finetune.inputs=$(inputs_hash)" "$@" "$root" 2>&1 |
    tee "$log" | sed -u -nE '/^(Step |#[0-9]+ \[)/ { s/^(.{96}).*/\1 .../; p }' ||
    fail 19 "The image did not build; no image was tagged. The last lines of $log:" "$(build_error "$log")"
  say "Built $image"
}

ensure_image() {
  if ! docker image inspect "$image" >/dev/null 2>&1; then
    say "There is no image yet; the first build compiles xformers and takes about 10 minutes."
    build
  elif [[ $(image_label finetune.host-uid) != "$HOST_UID" ]]; then
    say "The image was built for uid $(image_label finetune.host-uid); its last layers are rebuilt for yours, $HOST_UID."
    build
  elif [[ $(image_label finetune.inputs) != "$(inputs_hash)" ]]; then
    say "Note: Dockerfile.dgx-spark or requirements/ changed since the image was built: ./start_docker.sh build"
  fi
}

# ---- start --------------------------------------------------------------------------------------

up() {
  local answer
  # The folder must exist: Docker would create it, but as root's.
  mkdir -p "$HF_CACHE"
  if ! answer=$(compose up --detach --no-build --force-recreate "$1" 2>&1); then
    case $answer in
      *"could not select device driver"*) no_runtime ;;
      *) fail 25 "Docker could not start $1:" "$answer" ;;
    esac
  fi
}

# wait_healthy CONTAINER SECONDS SERVICE
wait_healthy() {
  local deadline=$((SECONDS + $2)) state
  while ((SECONDS < deadline)); do
    state=$(docker inspect -f '{{.State.Status}}/{{.State.Health.Status}}' "$1")
    case $state in
      running/healthy) return ;;
      exited/* | restarting/* | running/unhealthy) break ;;
    esac
    sleep 0.5
  done
  fail 20 "$1 is not healthy ($state). The last lines of its log:" "$(docker logs --tail 15 "$1" 2>&1)
Health check: $(docker inspect -f '{{range .State.Health.Log}}{{println .Output}}{{end}}' "$1" | tail -n 2 | head -c 300)
Then: ./start_docker.sh restart; the whole log: ./start_docker.sh logs $3"
}

summary() {
  row "Jupyter Lab" "$(url)"
  row "from afar" "ssh -N -L $JUPYTER_PORT:127.0.0.1:$JUPYTER_PORT ${USER:-you}@$(hostname), then open the same address"
  row "mounts" "$root -> /workspace"
  row "" "$HF_CACHE -> /home/trainer/.cache/huggingface"
  row "memory" "$(memory_gib MemAvailable) GiB available of $(memory_gib MemTotal) GiB"
}

start_finetune() {
  check_checkout
  ensure_token
  if running "$container" && gpu_visible; then
    say "$container is already running."
  else
    if running "$container"; then
      # `systemctl daemon-reload` on the host takes the GPU from running containers.
      say "$container has lost its GPU; it is created anew."
    else
      check_port "$JUPYTER_PORT" JUPYTER_PORT >/dev/null
    fi
    check_memory >/dev/null
    ensure_image
    up "$container"
  fi
  wait_healthy "$container" "$start_timeout" finetune
  gpu_visible || fail 22 "$container runs, but sees no GPU: nvidia-smi fails in it." \
    "If nvidia-smi works on the host: sudo systemctl restart docker, then ./start_docker.sh restart"
  summary
}

start_tensorboard() {
  ensure_token
  running pytorch-tensorboard || {
    check_port "$TENSORBOARD_PORT" TENSORBOARD_PORT >/dev/null
    ensure_image
    up tensorboard
  }
  wait_healthy pytorch-tensorboard "$start_timeout" tensorboard
  row "TensorBoard" "http://127.0.0.1:$TENSORBOARD_PORT"
}

# The arguments of `vllm serve` for FOLDER: a merged model as it is; an adapter on top of its base.
serve_args() {
  local base
  if [[ -e $root/$1/adapter_config.json ]]; then
    base=$(sed -n 's/.*"base_model_name_or_path": *"\([^"]*\)".*/\1/p' "$root/$1/adapter_config.json")
    say "$base --enable-lora --max-lora-rank 64 --lora-modules tuned=/workspace/$1"
  elif [[ -e $root/$1/config.json ]]; then
    say "/workspace/$1 --served-model-name tuned"
  else
    fail 26 "There is no model to serve in ${1:-checkpoints/ or adapters/}." \
      "A folder with config.json (merged model) or adapter_config.json (adapter) is needed: train one first."
  fi
}

# One level down: checkpoints/.training holds the states of unfinished runs.
newest_model() {
  cd "$root" && find checkpoints adapters -mindepth 2 -maxdepth 2 \( -name config.json -o -name adapter_config.json \) -printf '%T@ %h\n' |
    sort -rn | head -n 1 | cut -d' ' -f2-
}

start_serve() {
  local folder
  if running pytorch-serve; then
    say "pytorch-serve is already running; to serve another folder, ./start_docker.sh stop first."
  else
    folder=${1:-$(newest_model)}
    SERVE_ARGS=$(serve_args "${folder%/}")
    export SERVE_ARGS
    ensure_token
    check_port "$SERVE_PORT" SERVE_PORT >/dev/null
    check_memory >/dev/null
    ensure_pulled "$(compose --profile serve config --images serve)"
    say "Serving ${folder%/}; loading takes some minutes."
    up serve
  fi
  wait_healthy pytorch-serve "$serve_timeout" serve
  row "vLLM" "http://127.0.0.1:$SERVE_PORT/v1 (model: tuned)"
}

# ---- commands -----------------------------------------------------------------------------------

cmd_start() {
  local service=${1:-finetune}
  service_name "$service" >/dev/null
  if [[ $service == serve ]]; then all_read "${@:3}"; else all_read "${@:2}"; fi
  check_user >/dev/null
  preflight
  "start_$service" "${@:2}"
}

stop_all() {
  local answer
  answer=$(compose --profile '*' down --remove-orphans --timeout 20 2>&1) || fail 25 "Docker could not stop the containers:" "$answer"
  say "Stopped. Files, adapters and checkpoints are where they were."
}

# Takes no service: all stop, and a name here would end more than was meant.
cmd_stop() {
  all_read "$@"
  preflight
  stop_all
}

cmd_restart() {
  all_read "$@"
  check_user >/dev/null
  preflight
  check_checkout
  stop_all
  start_finetune
}

cmd_build() {
  local options=()
  for word in "$@"; do
    case $word in
      finetune) ;;
      --no-cache) options+=(--no-cache) ;;
      *) unknown "thing to build" "$word" finetune --no-cache ;;
    esac
  done
  check_user >/dev/null
  preflight
  build "${options[@]}"
}

cmd_logs() {
  local service=finetune options=(--tail 200)
  for word in "$@"; do
    case $word in
      -f | --follow) options+=(--follow) ;;
      *) service=$word ;;
    esac
  done
  service=$(service_name "$service")
  preflight
  [[ -n $(compose --profile '*' ps --all --quiet "$service") ]] ||
    fail 3 "$service has no container, and so no log." "./start_docker.sh status shows what there is."
  compose --profile '*' logs "${options[@]}" "$service"
}

need_running() {
  running "$container" || fail 3 "$container is not running." "./start_docker.sh start finetune"
}

# A terminal inside only where there is one outside: cron and scripts have none.
in_container() {
  local tty=()
  [[ ! -t 0 || ! -t 1 ]] || tty=(--tty)
  docker exec --interactive "${tty[@]}" "$container" "$@"
}

cmd_exec() {
  (($#)) || fail 2 "exec needs a command." "For example: ./start_docker.sh exec nvidia-smi"
  preflight
  need_running
  in_container "$@"
}

cmd_shell() {
  all_read "$@"
  cmd_exec bash
}

cmd_run() {
  cmd_start finetune
  in_container python -m finetune run --profile spark "$@"
}

# What is busy inside, asked inside, where the token is in the environment: kernels by Jupyter's own
# API, training runs by the progress.json they keep. One JSON object a line.
activity() {
  docker exec --interactive "$container" python -I - <<'PYTHON'
import json, os, pathlib, time
from http.client import HTTPConnection

server = HTTPConnection("127.0.0.1", 8888, timeout=5)
server.request("GET", "/api/sessions", headers={"Authorization": "token " + os.environ["JUPYTER_TOKEN"]})
for session in json.load(server.getresponse()):
    if session["kernel"]["execution_state"] == "busy":
        print(json.dumps({"notebook": session["path"]}))

for progress in sorted(pathlib.Path("/workspace/results").rglob("progress.json")):
    record = progress.with_name("record.json")
    if record.exists() and record.stat().st_mtime >= progress.stat().st_mtime:
        continue
    run = json.loads(progress.read_text())
    print(json.dumps({"run": run["run"], "step": run["step"], "total_steps": run["total_steps"],
                      "seconds_left": round(run["seconds_left"]), "silent_seconds": round(time.time() - run["updated"])}))
PYTHON
}

# {"run": ...} -> a line for people; silent for ten minutes means killed or hung, and is said.
activity_line() {
  local text=$1
  value() { sed -nE "s/.*\"$1\": \"?([^\",}]*).*/\1/p" <<<"$text"; }
  if [[ $text == '{"notebook"'* ]]; then
    row "notebook" "$(value notebook) is executing"
  elif (($(value silent_seconds) > 600)); then
    row "training" "$(value run): ${yellow}no sign of life for $(duration "$(value silent_seconds)")$plain, at step $(value step) of $(value total_steps)"
  else
    row "training" "$(value run): step $(value step) of $(value total_steps), $(duration "$(value seconds_left)") left"
  fi
}

duration() { if (($1 < 3600)); then say "$(($1 / 60)) min"; else say "$(($1 / 3600)) h $(($1 % 3600 / 60)) min"; fi; }

cmd_status() {
  case ${1:-} in
    '' | --json) ;;
    *) unknown option "$1" --json ;;
  esac
  all_read "${@:2}"
  preflight
  local containers health=none gpu='' lines=''
  containers=$(docker ps --all --filter "label=com.docker.compose.project=$project" --format '{{.Names}}|{{.State}}|{{.Status}}')
  if running "$container"; then
    health=$(docker inspect -f '{{.State.Health.Status}}' "$container")
    gpu=$(docker exec "$container" nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits 2>/dev/null || true)
    # A server that does not answer has no activity to tell of.
    lines=$(activity 2>/dev/null || true)
  fi
  if [[ ${1:-} == --json ]]; then
    status_json "$containers" "$health" "$gpu" "$lines"
  else
    status_text "$containers" "$health" "$gpu" "$lines"
  fi
  running "$container" || exit 3
}

status_text() {
  local name state since line
  [[ -n $1 ]] || row "container" "none: ./start_docker.sh start finetune"
  while IFS='|' read -r name state since; do
    [[ -z $name ]] || row "container" "$name: $state ($since)"
  done <<<"$1"
  [[ $2 == none ]] || row "Jupyter Lab" "$(url)"
  [[ $2 == none ]] || row "GPU" "${3:-not visible in the container: ./start_docker.sh start finetune creates it anew}${3:+ % busy}"
  row "memory" "$(memory_gib MemAvailable) GiB available of $(memory_gib MemTotal) GiB"
  while IFS= read -r line; do
    [[ -z $line ]] || activity_line "$line"
  done <<<"$4"
}

# The token stays out of the JSON, which scripts log; it is in .env.
status_json() {
  local name state since list='' up=false
  ! running "$container" || up=true
  while IFS='|' read -r name state since; do
    [[ -z $name ]] || list+="${list:+, }{\"name\": \"$name\", \"state\": \"$state\", \"status\": \"$since\"}"
  done <<<"$1"
  printf '{"running": %s, "health": "%s", "url": "http://127.0.0.1:%s/lab", "gpu_percent": %s, "mem_available_gib": %s, "containers": [%s], "activity": [%s]}\n' \
    "$up" "$2" "$JUPYTER_PORT" "${3:-null}" \
    "$(memory_gib MemAvailable)" "$list" "$(paste -sd, <<<"$4")"
}

# Every check in a subshell, so that one failure does not hide the next. The exit code is the first one's.
cmd_doctor() {
  all_read "$@"
  local first=0 code answer
  doctor_line() {
    code=0
    answer=$(red='' yellow='' plain='' "$2" 2>&1) || code=$?
    if ((code == 0)); then
      printf '%sok%s    %-12s %s\n' "$green" "$plain" "$1" "$answer"
    else
      printf '%sFAIL%s  %-12s %s\n' "$red" "$plain" "$1" "${answer#*error: }"
      ((first != 0)) || first=$code
    fi
  }
  load_settings
  doctor_line user check_user
  doctor_line docker check_docker
  doctor_line daemon check_daemon
  # Without a daemon, what only it knows would fail for no reason of its own.
  if ((first == 0 || first == 15)); then
    doctor_line compose check_compose
    doctor_line runtime check_runtime
    doctor_line port check_jupyter_port
    doctor_line "image disk" check_image_disk
  fi
  doctor_line GPU check_gpu
  doctor_line unified check_unified
  doctor_line memory check_memory
  doctor_line "model disk" check_checkpoint_disk
  exit "$first"
}

commands=(start stop restart status logs build exec shell run doctor help)

main() {
  local command=${1:-}
  case $command in
    '')
      usage >&2
      exit 2
      ;;
    help | -h | --help) usage ;;
    start | stop | restart | status | logs | build | exec | shell | run | doctor) "cmd_$command" "${@:2}" ;;
    *) unknown command "$command" "${commands[@]}" ;;
  esac
}

main "$@"
