// Products of few rows by a weight in float32: [tokens, in] by [out, in].
//
// A weight's row is read as it lies, number by number, and each number is multiplied with all
// tokens at once: sixteen of them are one register, and twelve rows by 32 tokens stay in registers
// while a row is passed. The floor is 2 * tokens * in * out operations, or the weight's bytes where
// tokens are few. Every sum goes along `in` in order, whatever the number of tokens: a token's
// result is the same bit for bit beside any others.
#include "lanes.h"
#include "threads.h"
#include "transpose.h"

namespace hotbay {
namespace {

constexpr int ROWS = 12;
constexpr int64_t STEP = 4;
constexpr int64_t DEPTH = 128;  // numbers of a row that are summed before the rest joins them

// `packed`: for each run of BLOCKS * 16 tokens, [in][BLOCKS * 16], the tokens that lack being zero.
INLINE void pack(const float* rows, int64_t stride, float* packed, int64_t tokens,
                 int64_t blocks, int64_t first, int64_t end) {
    for (int64_t block = 0; block < blocks; block++) {
        int64_t here = tokens - block * LANES;
        here = here < LANES ? here : LANES;
        int64_t at = first;
        for (; at + LANES <= end; at += LANES) {
            Lanes square[LANES];
            for (int64_t token = 0; token < LANES; token++)
                square[token] = token < here ? load(rows + (block * LANES + token) * stride + at)
                                             : Lanes{};
            transpose(square);
            for (int64_t k = 0; k < LANES; k++)
                store(packed + ((at + k) * blocks + block) * LANES, square[k]);
        }
        for (; at < end; at++)
            for (int64_t token = 0; token < LANES; token++)
                packed[(at * blocks + block) * LANES + token] =
                    token < here ? rows[(block * LANES + token) * stride + at] : 0.0f;
    }
}

// Sums of COUNT rows of the weight by BLOCKS * 16 tokens, to columns[row][token]. Meanwhile what
// follows them in memory is fetched, as much as they are, if `fetch` says so.
template <int COUNT, int BLOCKS>
INLINE void strip(const float* weight, const float* packed, int64_t width, bool fetch,
                  float* columns) {
    const char* following = (const char*)(weight + COUNT * width);
    for (int64_t deep = 0; deep == 0 || deep < width; deep += DEPTH) {
        int64_t end = deep + DEPTH < width ? deep + DEPTH : width;
        Lanes sums[COUNT][BLOCKS] = {};
        for (int64_t at = deep; at < end; at += STEP) {
            int64_t last = at + STEP < end ? at + STEP : end;
            if (fetch)
#pragma GCC unroll 4
                for (int line = 0; line < int(COUNT * STEP + LANES - 1) / LANES; line++)
                    __builtin_prefetch(following + at * COUNT * 4 + line * 64, 0, 2);
            for (int64_t k = at; k < last; k++) {
                Lanes tokens[BLOCKS];
#pragma GCC unroll 2
                for (int block = 0; block < BLOCKS; block++) {
                    tokens[block] = load(packed + (k * BLOCKS + block) * LANES);
                    in_register(tokens[block]);
                }
#pragma GCC unroll 16
                for (int row = 0; row < COUNT; row++) {
                    Lanes number = all(weight[row * width + k]);
#pragma GCC unroll 2
                    for (int block = 0; block < BLOCKS; block++)
                        sums[row][block] += number * tokens[block];
                }
            }
        }
#pragma GCC unroll 16
        for (int row = 0; row < COUNT; row++)
#pragma GCC unroll 2
            for (int block = 0; block < BLOCKS; block++) {
                float* to = columns + (row * BLOCKS + block) * LANES;
                store(to, deep ? load(to) + sums[row][block] : sums[row][block]);
            }
    }
}

template <int BLOCKS>
void strips(int64_t count, const float* weight, const float* packed, int64_t width, bool fetch,
            float* columns) {
    switch (count) {
#define STRIP(n) \
    case n: return strip<n, BLOCKS>(weight, packed, width, fetch, columns);
        STRIP(1) STRIP(2) STRIP(3) STRIP(4) STRIP(5) STRIP(6) STRIP(7) STRIP(8) STRIP(9)
        STRIP(10) STRIP(11) STRIP(12)
#undef STRIP
    }
}

struct Product {
    const float* packed;
    const float* weight;  // [out][in]
    const float* bias;    // [out] or null
    float* out;           // [tokens][out]
    int64_t tokens, width, outs;
};

constexpr int64_t TURNED = 4 * ROWS;  // rows of the weight whose results are turned at once

// Sixteen rows of the weight by sixteen tokens, turned and put where they belong.
INLINE void put_square(const Product& all, const float* columns, int64_t stride, int64_t row,
                       int64_t rows, int64_t token) {
    Lanes square[LANES];
    for (int64_t at = 0; at < LANES; at++) square[at] = load(columns + at * stride);
    transpose(square);
    Lanes bias = all.bias ? load(all.bias + row, rows) : Lanes{};
    for (int64_t at = 0; at < LANES && token + at < all.tokens; at++)
        store(all.out + (token + at) * all.outs + row, square[at] + bias, rows);
}

// `count` rows of the weight, from `first` on, by the BLOCKS * 16 tokens from `token` on.
template <int BLOCKS>
void rows_by_tokens(const Product& all, int64_t token, int64_t first, int64_t count) {
    alignas(64) float columns[TURNED * BLOCKS * LANES];
    int64_t pieces = (count + ROWS - 1) / ROWS;
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t row = count * piece / pieces, next = count * (piece + 1) / pieces;
        strips<BLOCKS>(next - row, all.weight + (first + row) * all.width,
                       all.packed + token * all.width, all.width, token == 0,
                       columns + row * BLOCKS * LANES);
    }
    for (int64_t row = 0; row < count; row += LANES)
        for (int64_t block = 0; block < BLOCKS; block++)
            put_square(all, columns + (row * BLOCKS + block) * LANES, BLOCKS * LANES, first + row,
                       count - row, token + block * LANES);
}

}  // namespace
}  // namespace hotbay

// `packed` has room for 16 * ceil(tokens / 16) * in floats.
extern "C" void hotbay_linear_float(const float* rows, int64_t stride, const float* weight,
                                    const float* bias, float* out, float* packed, int64_t tokens,
                                    int64_t width, int64_t outs) {
    using namespace hotbay;
    constexpr int64_t PAIR = 2 * LANES;
    Product all{packed, weight, bias, out, tokens, width, outs};
    auto blocks_at = [=](int64_t token) { return tokens - token > LANES ? 2 : 1; };
    share(width, tokens * width, LANES, [=](int64_t first, int64_t end) {
        for (int64_t token = 0; token < tokens; token += PAIR)
            pack(rows + token * stride, stride, packed + token * width, tokens - token,
                 blocks_at(token), first, end);
    });
    share(outs, tokens * width * outs, ROWS, [=](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row += TURNED)
            for (int64_t token = 0; token < tokens; token += PAIR) {
                int64_t count = end - row < TURNED ? end - row : TURNED;
                if (blocks_at(token) == 2) rows_by_tokens<2>(all, token, row, count);
                else rows_by_tokens<1>(all, token, row, count);
            }
    });
}

// Whether there are registers for twelve rows by 32 tokens: products are not worth it without.
extern "C" int hotbay_has_wide_vectors() {
#if defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}
