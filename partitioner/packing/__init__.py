"""From models and what they need to a layout of the node and a place for each of them.

It owns the packing: what fits into a room together (`rooms`), which models go to which GPU
(`packer`, with `branching` where they are few, graded by `exact`), one arrival at a time
(`arriving`), which instances are worth moving (`defragmenting`), and why something was left out
(`why`). It is pure: values in, values out. It
never applies anything: what comes out is a layout file, which is planned like any other.
"""
