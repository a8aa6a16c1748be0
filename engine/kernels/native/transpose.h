// Sixteen by sixteen floats turned over, or added up row by row, in registers.
#pragma once

#include "lanes.h"

namespace hotbay {

// Row r of `rows` becomes column r: four rounds, each of which exchanges blocks of twice the size.
INLINE void transpose(Lanes rows[LANES]) {
    const IntLanes lows[4] = {
        {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
        {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
        {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
        {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
    };
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
        int step = 1 << round;
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) {
            if (row & step) continue;
            Lanes a = rows[row], b = rows[row + step];
            rows[row] = __builtin_shuffle(a, b, lows[round]);
            rows[row + step] = __builtin_shuffle(a, b, lows[round] + step);
        }
    }
}

// Each row's sum, to the lane of its number. A round takes the halves that one of two rows gives up
// for those of the other, by one exchange and one blend, and adds them: half as many rows are left.
INLINE Lanes row_sums(Lanes rows[LANES]) {
    const IntLanes crossed[4] = {
        {1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30},
        {2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29},
        {4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27},
        {8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23},
    };
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
        const IntLanes second = (lane & (1 << round)) != 0;
#pragma GCC unroll 8
        for (int row = 0; row < (LANES / 2 >> round); row++) {
            Lanes a = rows[2 * row], b = rows[2 * row + 1];
            rows[row] = (second ? b : a) + __builtin_shuffle(a, b, crossed[round]);
        }
    }
    return rows[0];
}

}  // namespace hotbay
