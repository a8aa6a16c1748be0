"""What a decoder step is made of: the operations every device implements, and their references.

A model calls the operations of `protocol`; `reference` has them in torch, which serves on the
processor and is what kernels for other devices are measured against.
"""
