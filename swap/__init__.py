"""Images of weights: built, kept in host memory, and put on a device at the speed of its link.

An image (`image`) is built (`build`) from a checkpoint (`checkpoint`) into a sealed segment
(`segment`), kept by the host store (`store`), and copied (`transfer`) into a region of stable
addresses (`arena`) of a device (`device`: `host_device` or `cuda_device`), as planned (`plan`).
Nothing here knows what a model computes, and nothing here imports torch or any other package of the
project.
"""
