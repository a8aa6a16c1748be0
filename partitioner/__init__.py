"""The partition tree of one node: what GPUs there are, how they may be cut, and what they report.

The package owns the board catalogue, the NVML reader, partitions as values, and the simulated node.
It imports nothing else of the project, never loads torch and never opens a CUDA context. Nothing
is imported here, so that a program pays only for the modules it names.
"""
