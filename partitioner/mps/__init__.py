"""MPS: several processes on one GPU or GPU instance, each with limits of threads and memory.

`control` says what a control daemon can be asked, `legacy` (v2) and `named` (v3) ask it in its two
languages, `probing` finds out which of them a driver has, `commands` runs its program within a
bounded time, `static` is about multiprocessors that belong to one share alone, `lifetime` starts
and stops it, `sightings` looks at who is there, `recovery` brings a server back after a fatal
fault, and `mending` decides where that is to be done.
"""
