#!/usr/bin/env bash
# Prints a PATH with another Debian release's Docker engine, client and buildx in front, fetched on first use:
#
#   PATH=$(tests/container/engine.sh trixie) .venv/bin/python -m pytest tests/container -m container
#
# Nothing is installed. runc stays the machine's own, because a newer release's wants a newer C library.
set -euo pipefail

suite=${1:?names the release, e.g. trixie}
# Not in the home: the tests run the client as another user too.
folder=${TMPDIR:-/tmp}/finetune-engine-$suite
packages=(docker.io docker-cli docker-buildx containerd)

# apt-get and its files, apart from the machine's own, on the server that the machine uses.
apt() {
  apt-get -qq -o Dir::Etc::sourcelist="$folder/sources.list" -o Dir::Etc::sourceparts=- \
    -o Dir::State::lists="$folder/lists" -o APT::Sandbox::User=root "$@" >&2
}

if [[ ! -e $folder/complete ]]; then
  rm -rf "$folder"
  mkdir -p "$folder/lists/partial" "$folder/packages"
  server=$(apt-get indextargets --format "\$(REPO_URI)" 'Origin: Debian' | sort -u | grep -m 1 'debian/$')
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $server $suite main" >"$folder/sources.list"
  apt update
  (cd "$folder/packages" && apt download "${packages[@]/%//$suite}")
  for package in "$folder"/packages/*.deb; do
    dpkg --extract "$package" "$folder"
  done
  touch "$folder/complete"
fi
printf '%s\n' "$folder/usr/sbin:$folder/usr/bin:$folder/usr/libexec/docker/cli-plugins:$PATH"
