#!/usr/bin/env bash
# The same set-up as the demo, the linter, and the test suite; arguments go to pytest, --slow adds the long tests.
# Tests of real data or a real model read NANOLOST_DATA and NANOLOST_MODEL, folders, and are skipped without.
EXTRAS=test,plot source "$(dirname "$0")/setup.sh"
ruff check .
# Two tests side by side: most wait for the processes that they start. Each computes on one thread, as threads that
# wait for each other lose far more on a busy machine than they gain here (OpenMP's spin).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -q -n 2 --dist worksteal "$@"
