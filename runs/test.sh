#!/usr/bin/env bash
# The same set-up as the demo, the linter, and the whole test suite; arguments go to pytest.
EXTRAS=test,plot source "$(dirname "$0")/setup.sh"
ruff check .
python -m pytest -q "$@"
