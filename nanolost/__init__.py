"""What the commands share, one thing a room.

Import it before torch: OpenMP reads these variables once, when torch loads it. A thread that has done its
part of a product spins while it waits for the others: for milliseconds by GNU's default, for 200 ms by LLVM's
and Intel's, also against a neighbour who has work for the core. On two quiet cores 1,000 spins cost 5 % of
the default's speed, and to sleep at once (OMP_WAIT_POLICY=PASSIVE) costs 40 %. With one core busy they have
1.6 and 2.1 times its speed, and with more neighbours the default stands still."""
import os

# who started this process, noted before the seconds that torch takes to load, in which a launcher may die
PARENT = os.getppid()

WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
OWN = {"OMP_WAIT_POLICY", "KMP_LIBRARY", *WAITING}

# each of these overrules another: who has set one knows better
if not OWN & set(os.environ):
    os.environ.update(WAITING)
