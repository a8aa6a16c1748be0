"""What hotbayd does: plans, loads, swaps, drains, swaps on demand, and recovery after a start.

Pure decisions (`planning`, `demand`) beside the executors that carry them out.
"""
