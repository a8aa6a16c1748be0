"""gpuctl, the command line: it asks hotbayd over the control API and prints what it says."""
