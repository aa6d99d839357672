"""How long the threads of a CPU wait for each other awake; imported before torch, which reads it once.

Threads of OpenMP spin while they wait, by default for milliseconds. Two programs on the same cores then wait for
threads that do not run: two drawings at once took 5 to 25 times as long as one (docs/sampling.md). A fraction of a
millisecond is longer than the gaps between the operations of one program, and short enough for two. Whoever sets
GOMP_SPINCOUNT or OMP_WAIT_POLICY, or imports torch first, decides otherwise.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of some 20 to 50 ns each
