"""What the host offers and lacks: probes over a few effects, findings, a report.

Asked by the API and by `hotbayd --doctor`; it knows nothing of the running node.
"""
