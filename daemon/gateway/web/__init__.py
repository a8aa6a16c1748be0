"""The HTTP front: one client's request as an object, the paths, and the node's own pages.

Plain ASGI, since a framework's request objects cost more than a token does. Every error leaves in
OpenAI's shape.
"""
