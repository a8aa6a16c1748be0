"""The links between Hotbay's processes: frames on Unix sockets, and the messages they carry.

Nothing here imports torch, decides anything or knows a process's business: `frames` moves bytes
and descriptors, `peer` pairs calls with replies, and `control`, `tokens`, `routes` and `build` each
hold the messages of one link, as data. Both ends of a link import the same file.
"""
