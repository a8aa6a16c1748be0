"""The control API: each of hotbay.v1's services, on the daemon's parts.

A service turns a message into a wish or a question and an answer into a message; it decides
nothing. `server` finds the methods, maps every error in one place, and answers what is not there
yet as not implemented.
"""
