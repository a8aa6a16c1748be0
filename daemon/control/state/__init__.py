"""What hotbayd knows: the journal on disk, the records in it, models, operations, and where all is.

Nothing here waits for a process; it is what the other folders share.
"""
