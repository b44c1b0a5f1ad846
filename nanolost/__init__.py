"""What the commands share, one thing a room.

Import it before torch: OpenMP reads these variables once, when torch loads it."""
import os

# A thread that has finished its part of a product waits for the others: it spins for up to 5 ms by GNU's
# default and 200 ms by LLVM's and Intel's, also against a neighbour who has work for the core. A short spin
# costs 5 % of a quiet machine's speed; asleep at once (OMP_WAIT_POLICY=PASSIVE) costs 40 %.
WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
OWN = {"OMP_WAIT_POLICY", "KMP_LIBRARY", *WAITING}

# who has set one of them knows better
if not OWN & set(os.environ):
    os.environ.update(WAITING)
