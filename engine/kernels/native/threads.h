// Work shared out over torch's threads.
//
// The OpenMP runtime is the one torch has loaded, so its threads and their number are the same:
// no processor is asked for twice.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hotbay {

// Less than this is done before other threads are awake: about a microsecond of one core.
constexpr int64_t ELEMENTS_ALONE = 1 << 12;

// Calls work(first, end) on each thread with a run of `count` items, in multiples of `unit`.
template <typename Work>
void share(int64_t count, int64_t elements, int64_t unit, const Work& work) {
#if defined(_OPENMP)
    if (elements > ELEMENTS_ALONE && count > unit && omp_get_max_threads() > 1) {
#pragma omp parallel
        {
            int64_t units = (count + unit - 1) / unit;
            int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
            int64_t first = units * thread / threads * unit;
            int64_t end = units * (thread + 1) / threads * unit;
            if (first < end) work(first, end < count ? end : count);
        }
        return;
    }
#endif
    if (count) work(int64_t(0), count);
}

// Calls work(item, following) for each of `count` items, which threads take in turn: neighbours
// cost alike. `following` is what the same thread does after it, or `count` or more.
template <typename Work>
void deal(int64_t count, int64_t elements, const Work& work) {
#if defined(_OPENMP)
    if (elements > ELEMENTS_ALONE && count > 1 && omp_get_max_threads() > 1) {
#pragma omp parallel
        {
            int64_t threads = omp_get_num_threads();
            for (int64_t item = omp_get_thread_num(); item < count; item += threads)
                work(item, item + threads);
        }
        return;
    }
#endif
    for (int64_t item = 0; item < count; item++) work(item, item + 1);
}

}  // namespace hotbay
