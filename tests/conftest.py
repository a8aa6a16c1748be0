"""What holds for every test."""

from __future__ import annotations

import os

# Before torch is loaded: threads that wait for each other sleep instead of spinning, or a machine
# that has other work makes every small product as slow as the scheduler's quantum.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
