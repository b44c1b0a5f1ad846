# Sourced by the other scripts: .venv with the tested versions of everything, made once. EXTRAS: test, plot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=".venv/installed-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-${EXTRAS:-none}"
if [ ! -e "$stamp" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"
    touch "$stamp"
fi
source .venv/bin/activate
