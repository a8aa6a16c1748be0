// Which sources this library was compiled from, as `sources.py` counts them.
#include <cstdint>

extern "C" uint64_t hotbay_sources() { return HOTBAY_SOURCES; }
