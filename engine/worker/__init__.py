"""A worker: one process that owns one partition's memory, its engines and their step loop.

It serves two links, one to hotbayd and one to the gateway, and carries out what they ask; it never
decides which model runs where. Everything that touches an engine or its pages happens on the step
thread (`loop`, `exchange`, `drain`); the main thread only moves messages (`server`).
"""
