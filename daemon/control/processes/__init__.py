"""The processes of the node: how each is started, found, adopted, spoken to and ended.

Nothing here knows models or decides what runs; the fleet keeps running what it is told to.
"""
