"""Text to tokens and back: tokenizers, chat templates, incremental decoding, stop strings.

Nothing here knows HTTP, routes or workers. What is read from a model's directory is read once, in a
thread, and shared by all requests of the model; what a request changes belongs to that request.
"""
