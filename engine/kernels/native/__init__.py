"""The operations in C++ for the processor: what torch does in several passes, in one."""
