#!/usr/bin/env bash
# Make a virtual environment from the lock: install.sh VENV PYTHON LOG.
#
# In: the folder of the environment, an interpreter, a file for the log. Out: the environment, with headtail installed in place.
# A step that fails prints one line: which step, what pip or the build said, where the log is. Used by `make install`;
# docs/decisions/0004-cpu-lock.md says why the lock is installed in this order.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1 python=$2 log=$3
torch_index=https://download.pytorch.org/whl/cpu
mkdir -p "$(dirname "$log")"
: >"$log"

# The line of the log that says why: what Python or a compiler raised, else pip's own error, else the last line.
reason() {
  local found
  found=$(grep -aE '^[[:space:]]*([A-Za-z_.]*(Error|Exception)|fatal error|[^ ]+: fatal error): ' "$log" | tail -n 1) ||
    found=$(grep -aE '^[[:space:]]*(ERROR|Error|error): ' "$log" | tail -n 1) ||
    found=$(grep -av '^[[:space:]]*$' "$log" | tail -n 1) || found="it printed nothing"
  sed -E 's/^[[:space:]]+//; s/[[:space:]]+$//' <<<"$found" | cut -c1-300
}

step() {
  local name=$1 started=$SECONDS
  shift
  echo "== $name: $*" >>"$log"
  if ! "$@" >>"$log" 2>&1; then
    echo "error: install failed at \"$name\": $(reason) (whole log: $log)" >&2
    exit 1
  fi
  echo "  $name: $((SECONDS - started)) s"
}

pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation "$@"; }

make_venv() { [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"; }

# PyTorch's own index is added where it answers; elsewhere pip's configured index or folder of wheels has the CPU build.
torch() {
  local answers='import urllib.request; urllib.request.urlopen("'$torch_index'/torch/", timeout=3)' index=()
  if timeout 5 "$venv/bin/python" -c "$answers" 2>/dev/null; then index=(--extra-index-url "$torch_index"); fi
  pip ${index[@]+"${index[@]}"} -r requirements/torch.txt
}

setuptools() { pip --require-hashes -r <(grep '^setuptools==' requirements/cpu.lock); }

# DeepSpeed is the one package that is built here; without CUDA its build compiles nothing.
locked() { pip --require-hashes -r requirements/cpu.lock; }

echo "installing into $venv: a few minutes the first time ..."
step "virtual environment" make_venv
step "PyTorch for CPU" torch
step "setuptools" setuptools
step "locked packages" locked
step "headtail" pip -e .
