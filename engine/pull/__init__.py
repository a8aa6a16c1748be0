"""The puller: a short-lived process that brings one checkpoint from a hub to this host's disk.

`process` speaks to hotbayd, `hub` to the hub, `selection` says which files are needed, `fetch`
brings them. The only package that knows huggingface_hub.
"""
