"""The operations in torch: they serve on the processor and are the oracle of other kernels."""
