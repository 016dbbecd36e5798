#!/usr/bin/env bash
# Prints the folder that holds hadolint, shellcheck, shfmt and docker-compose, fetching them on first use.
# They stay out of the project's environment, and out of the checkout.
set -euo pipefail

list=$(dirname "$(readlink -f "$0")")/../../requirements/container-tests.txt
tools=${XDG_CACHE_HOME:-$HOME/.cache}/finetune-container-tools/$(sha256sum "$list" | cut -c1-16)

if [[ ! -e $tools/complete ]]; then
  python3 -m venv --clear "$tools"
  "$tools/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r "$list" >&2
  touch "$tools/complete"
fi
printf '%s\n' "$tools/bin"
