"""The decoder families: what a checkpoint says it is, how its weights are laid out, how it runs.

`spec` and `layout` never import torch, so that the image builder and tests of the control plane
can read a checkpoint's shape without it.
"""
