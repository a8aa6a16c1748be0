"""How hotbayd is asked: the services of hotbay.v1, and what they show of the other folders.

A service turns a message into a wish or a question and an answer into a message; it decides
nothing. `server` finds the methods, maps every error in one place, and answers what is not there
yet as not implemented. The watch and the metrics tell what changes without being asked.
"""
