# Sourced by the other scripts: .venv with the tested versions of everything, made once. EXTRAS: test, plot, hf.
# NEEDS: how many arguments a script must have. FIRST: what the first of them may be.
set -euo pipefail
case "${1:-}" in --help | -h)                  # the comment at the script's head, without its marks
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0 ;;
esac
mistake() {
    echo "error: $*; bash $0 --help says more" >&2
    exit 2
}
[ $# -ge "${NEEDS:-0}" ] || mistake "$# of ${NEEDS:-0} arguments"
if [ $# -gt 0 ] && [ -n "${FIRST:-}" ] && [[ " $FIRST " != *" $1 "* ]]; then
    mistake "unknown $1: the first argument is one of $FIRST"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# On Ctrl-C train.py saves and ends with 0, as it should: without this the script would go on to its next line.
trap 'echo "stopped: the same command continues" >&2; exit 130' INT
stamp=".venv/installed-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-${EXTRAS:-none}"
if [ ! -e "$stamp" ]; then
    echo "installing PyTorch and what else is needed into .venv, once: a minute or two on a quick line"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    # pip shows its progress: it brings some 200 MB, and on Linux with a GPU 3 GB
    .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"
    touch "$stamp"
    echo "installed"
fi
source .venv/bin/activate

# Go on only after a run that reached its last step: also a SIGTERM, which no trap here sees, ends train.py with 0.
require_finished() {                           # out_dir
    grep -q '"state": "finished"' "$1/status.json" && return
    echo "the run in $1 has not reached its last step: the same command continues it" >&2
    exit 1
}
