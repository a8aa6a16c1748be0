"""The OpenAI-compatible API: what requests may say, and exactly how answers look.

`fields`, `prompts`, `sampling` and `jobs` turn a body into what workers run; `choice` and
`logprobs` turn their outputs into text; `chunks` writes JSON; `serve` ties them to the dispatcher.
The types are strict: a field of the wrong type, out of bounds, or asking for what is not supported
is a 400 that names it; fields nobody knows are ignored, as servers of this API do.
"""
