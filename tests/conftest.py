"""What holds for every test."""

from __future__ import annotations

import os

# Before torch is loaded: threads that wait for each other soon sleep instead of spinning on. Where
# the machine has other work, spinning makes every small product as slow as a scheduler's quantum.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
