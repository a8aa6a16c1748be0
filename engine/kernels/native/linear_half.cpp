// Products of rows by a weight in bfloat16, on the matrix unit (AMX): [tokens, in] by [out, in].
//
// A tile is 16 rows of 64 bytes. The weight's tiles are loaded as they lie in memory, so its bytes
// are read once and nothing of it is rearranged; the tokens, which are few, are packed into pairs
// of numbers as the unit wants its other operand. Two tiles of the weight by two of the tokens are
// summed in float32 along `in` in order, whatever the number of tokens: a token's result is the
// same bit for bit beside any others. The floor is the weight's bytes where tokens are few.
#include "lanes.h"
#include "threads.h"
#include "transpose.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MATRIX_UNIT __attribute__((target("amx-tile,amx-bf16")))

namespace hotbay {
namespace {

constexpr int64_t DEEP = 32;                    // numbers of `in` in a tile's row
constexpr int64_t TILE = LANES * DEEP;          // numbers in a tile
constexpr int64_t PAIR = 2 * LANES;             // tokens, or rows of the weight, in two tiles

// Tokens as the unit's right operand: for each 16 of them and each 32 of `in`, a tile of
// [pair of numbers][token][2], the tokens that lack being zero.
void pack(const Bfloat* rows, int64_t stride, Bfloat* packed, int64_t tokens, int64_t width,
          int64_t first, int64_t end) {
    for (int64_t tile = first; tile < end; tile++) {
        int64_t token = tile / (width / DEEP) * LANES, at = tile % (width / DEEP) * DEEP;
        Lanes square[LANES];
        for (int64_t one = 0; one < LANES; one++) {
            square[one] = Lanes{};
            if (token + one < tokens)
                std::memcpy(&square[one], rows + (token + one) * stride + at, sizeof(Lanes));
        }
        transpose(square);
        std::memcpy(packed + tile * TILE, square, sizeof square);
    }
}

struct Product {
    const Bfloat* packed;
    const Bfloat* weight;  // [out][in]
    const Bfloat* bias;    // [out] or null
    Bfloat* out;           // [tokens][out]
    int64_t tokens, width, outs;
};

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Turns 16 rows of the weight by 16 tokens over, and stores them as the result's rows.
INLINE void put_tile(const Product& all, const float* sums, int64_t row, int64_t token) {
    Lanes square[LANES];
    for (int64_t one = 0; one < LANES; one++) square[one] = load(sums + one * LANES);
    transpose(square);
    Lanes bias = all.bias ? load(all.bias + row) : Lanes{};
    int64_t present = all.tokens - token < LANES ? all.tokens - token : LANES;
    for (int64_t one = 0; one < present; one++)
        store(all.out + (token + one) * all.outs + row, square[one] + bias);
}

// `ROWS` and `TOKENS` tiles of the weight and of the tokens; what follows is fetched meanwhile.
template <int ROWS, int TOKENS>
MATRIX_UNIT INLINE void square(const Product& all, int64_t row, int64_t token, bool last) {
    int64_t steps = all.width / DEEP;
    const Bfloat* upper = all.weight + row * all.width;
    const Bfloat* lower = upper + LANES * all.width;
    const Bfloat* left = all.packed + token / LANES * steps * TILE;
    const Bfloat* right = left + steps * TILE;
    const char* following = (const char*)(upper + ROWS * LANES * all.width);
    int64_t stride = all.width * int64_t(sizeof(Bfloat));
    _tile_zero(0);
    if (TOKENS == 2) _tile_zero(1);
    if (ROWS == 2) _tile_zero(2);
    if (ROWS == 2 && TOKENS == 2) _tile_zero(3);
    for (int64_t step = 0; step < steps; step++) {
        if (!last)
            for (int line = 0; line < ROWS * LANES; line++, following += 64)
                __builtin_prefetch(following, 0, 2);
        _tile_loadd(4, upper + step * DEEP, stride);
        _tile_loadd(6, left + step * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TOKENS == 2) {
            _tile_loadd(7, right + step * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (ROWS == 2) {
            _tile_loadd(5, lower + step * DEEP, stride);
            _tile_dpbf16ps(2, 5, 6);
            if (TOKENS == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[LANES * LANES];
    _tile_stored(0, sums, 64);
    put_tile(all, sums, row, token);
    if (TOKENS == 2) {
        _tile_stored(1, sums, 64);
        put_tile(all, sums, row, token + LANES);
    }
    if (ROWS == 2) {
        _tile_stored(2, sums, 64);
        put_tile(all, sums, row + LANES, token);
    }
    if (ROWS == 2 && TOKENS == 2) {
        _tile_stored(3, sums, 64);
        put_tile(all, sums, row + LANES, token + LANES);
    }
}

// Rows `first` to `end` of the weight by all tokens.
MATRIX_UNIT void rows_by_tokens(const Product& all, int64_t first, int64_t end) {
    static constexpr TileShapes shapes;  // constant: not all compilers see that all of it is read
    _tile_loadconfig(&shapes);
    asm volatile("" ::: "memory");  // nor that tiles are loaded from what was packed
    for (int64_t row = first; row < end; row += PAIR) {
        bool two = end - row > LANES;
        for (int64_t token = 0; token < all.tokens; token += PAIR) {
            bool last = token > 0 || row + 2 * PAIR > end;
            if (all.tokens - token > LANES) {
                if (two) square<2, 2>(all, row, token, last);
                else square<1, 2>(all, row, token, last);
            } else {
                if (two) square<2, 1>(all, row, token, last);
                else square<1, 1>(all, row, token, last);
            }
        }
    }
    _tile_release();
}

}  // namespace
}  // namespace hotbay

// Asks the kernel for the matrix unit, which it lends to a process that asks. 1 where it is there.
extern "C" int hotbay_use_matrix_unit() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// `in` is a multiple of 32, `out` one of 16; `packed` has room for 16 * ceil(tokens / 16) * in.
extern "C" void hotbay_linear_half(const void* rows, int64_t stride, const void* weight,
                                   const void* bias, void* out, void* packed, int64_t tokens,
                                   int64_t width, int64_t outs) {
    using namespace hotbay;
    Product all{(const Bfloat*)packed, (const Bfloat*)weight, (const Bfloat*)bias, (Bfloat*)out,
                tokens, width, outs};
    int64_t tiles = (tokens + LANES - 1) / LANES * (width / DEEP);
    share(tiles, tiles * TILE, 1, [=](int64_t first, int64_t end) {
        pack((const Bfloat*)rows, stride, (Bfloat*)packed, tokens, width, first, end);
    });
    share(outs, tokens * width * outs, LANES,
          [=](int64_t first, int64_t end) { rows_by_tokens(all, first, end); });
}

#else

extern "C" int hotbay_use_matrix_unit() { return 0; }
extern "C" void hotbay_linear_half(const void*, int64_t, const void*, const void*, void*, void*,
                                   int64_t, int64_t, int64_t) {}

#endif
