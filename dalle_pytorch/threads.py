"""How the threads of a CPU wait for each other; imported before torch, which reads it once.

Threads of OpenMP spin while they wait, for milliseconds. Two programs on the same cores then wait for threads that do
not run: each takes some 25 times as long as alone (docs/sampling.md). Threads that sleep cost a program that is alone
little. Whoever sets OMP_WAIT_POLICY or imports torch first decides otherwise.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
