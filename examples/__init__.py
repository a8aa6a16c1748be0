"""The example models and the programs that make them. Nothing of Hotbay itself imports this."""
