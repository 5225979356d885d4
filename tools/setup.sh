#!/bin/sh
# Build .venv and install the course in it: sh tools/setup.sh lab|dev
# `lab` is what a learner needs; `dev` is that and what tests and tools need. `make` calls this when settings or pins have changed.
#   PYTHON          the interpreter to use (default: the first of python3, python3.13, … that fits)
#   SFTLAB_NEED_MB  free disk to ask for, in MiB
set -eu
cd "$(dirname "$0")/.."
case ${1:-lab} in
    lab) extras=lab ;;
    dev) extras=lab,dev ;;
    *) echo "sftlab: usage: sh tools/setup.sh lab|dev" >&2; exit 2 ;;
esac
# Written last: without the first, an earlier install broke off, and .venv is built anew.
done=.venv/.installed
done_dev=.venv/.installed-dev

say() { printf '%s\n' "$*" >&2; }
die() { say "sftlab: $*"; exit 1; }

# --- a Python that fits
python=
seen=
bare=
for p in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    v=$("$p" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case $v in
        3.11|3.12|3.13) ;;
        *) seen="$seen $p is $v,"; continue ;;
    esac
    if "$p" -c 'import venv, ensurepip' 2>/dev/null; then python=$p; break; fi
    bare=${bare:-$v}
done
if [ -z "$python" ] && [ -n "$bare" ]; then
    die "Python $bare is here without its venv module. On Debian or Ubuntu: sudo apt install python3-venv (or python$bare-venv). Then run make again."
elif [ -z "$python" ]; then
    die "needs Python 3.11, 3.12 or 3.13, found:${seen:- none,} so install one, or name it: make lab PYTHON=/path/to/python3.12"
fi

# --- room on the disk (an earlier install's room counts as free: it is replaced)
cpu_only=
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then cpu_only=yes; fi
need=4000
if [ "$(uname -s)" = Linux ] && [ -z "$cpu_only" ]; then need=12000; fi  # torch brings CUDA along
need=${SFTLAB_NEED_MB:-$need}
free=$(df -Pk . | awk 'END { print int($4 / 1024) }')
if [ -d .venv ]; then free=$((free + $(du -sk .venv | awk '{ print int($1 / 1024) }'))); fi
[ "$free" -ge "$need" ] || die "needs $need MiB of free disk here, found $free MiB. Free some, then run make again."

# --- the environment
if [ ! -e "$done" ]; then
    say "Building .venv with $("$python" --version 2>&1) …"
    "$python" -m venv --clear .venv
fi
rm -f "$done" "$done_dev"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# uv installs the same packages in a third of pip's time. Where it cannot be had, or fails, pip does it.
uv=$(sed -n 's/^uv==/uv==/p' constraints.txt)
# As pip does, it compiles what it installs: else the first import of each module does, and is slow.
uv() { UV_COMPILE_BYTECODE=1 .venv/bin/uv --no-config pip "$@" --python .venv/bin/python; }
if [ ! -x .venv/bin/uv ]; then
    say "Fetching the installer ($uv) …"
    pip install --quiet "$uv" || say "uv cannot be had: pip does the work, which takes longer."
fi
if [ -x .venv/bin/uv ]; then eval "$(.venv/bin/python tools/uv_settings.py)"; fi
install() {
    if [ -x .venv/bin/uv ]; then
        uv install "$@" && return
        say "uv could not do it: pip tries."
    fi
    pip install "$@"
}

# A plain `torch` brings gigabytes of CUDA on Linux, so without an NVIDIA card PyTorch's own CPU wheels are tried first.
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
cpu_torch() {
    cpu=https://download.pytorch.org/whl/cpu
    if [ -x .venv/bin/uv ]; then
        UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 uv install --no-deps --default-index $cpu "torch==$torch"
    else
        pip install --no-deps --timeout 10 --retries 0 --index-url $cpu "torch==$torch"
    fi
}
if [ -n "$cpu_only" ]; then
    cpu_torch || say "PyTorch's CPU wheels are out of reach: taking torch from the usual index, which may be larger."
fi
say "Installing the course and what it needs ($extras) …"
install -c constraints.txt -e ".[$extras]" \
    || die "the installation failed, see the lines above (often the network). Run make again to start over."
: > "$done"
[ "$extras" = lab ] || : > "$done_dev"
say "Installed."
