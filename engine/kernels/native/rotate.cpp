// Queries and keys normalised and rotated, keys and values stored in their pages.
#include "lanes.h"
#include "threads.h"

namespace hotbay {
namespace {

template <typename Stored>
struct Heads {
    const Stored* qkv;             // [tokens][heads + 2 kv_heads][dim]
    const Stored* query_norm;      // [dim], null where heads are not normalised
    const Stored* key_norm;        // [dim]
    float epsilon;
    const float* cosines;          // [tokens][dim / 2]
    const float* sines;            // [tokens][dim / 2]
    const int64_t* cells;          // [tokens], where the first head's key goes
    Stored* keys;                  // of the layer, that cells count from
    int64_t values;                // elements from a key to its value
    int64_t head_stride;           // elements between heads of one token
    Stored* queries;               // [tokens][heads][dim]
    int64_t tokens, heads, kv_heads, dim;
};

// One head from `from` to `to`: (a, b) to (a cos - b sin, b cos + a sin).
template <typename Stored>
INLINE void turn(const Stored* from, const Stored* norm, float epsilon, const float* cosines,
                 const float* sines, Stored* to, int64_t dim) {
    int64_t half = dim / 2;
    float scale = norm ? 1.0f / __builtin_sqrtf(squares(from, dim) / float(dim) + epsilon) : 1.0f;
    for (int64_t at = 0; at < half; at += LANES) {
        int64_t count = half - at;
        Lanes a = load(from + at, count), b = load(from + half + at, count);
        if (norm) {
            a = rounded<Stored>(rounded<Stored>(a * scale) * load(norm + at, count));
            b = rounded<Stored>(rounded<Stored>(b * scale) * load(norm + half + at, count));
        }
        Lanes cosine = load(cosines + at, count), sine = load(sines + at, count);
        store(to + at, a * cosine - b * sine, count);
        store(to + half + at, b * cosine + a * sine, count);
    }
}

template <typename Stored>
void rotate_and_store(const Heads<Stored>& all) {
    int64_t width = (all.heads + 2 * all.kv_heads) * all.dim;
    share(all.tokens, all.tokens * width, 1, [&](int64_t first, int64_t end) {
        for (int64_t token = first; token < end; token++) {
            const Stored* from = all.qkv + token * width;
            const float* cosines = all.cosines + token * (all.dim / 2);
            const float* sines = all.sines + token * (all.dim / 2);
            Stored* query = all.queries + token * all.heads * all.dim;
            for (int64_t head = 0; head < all.heads; head++, from += all.dim, query += all.dim)
                turn(from, all.query_norm, all.epsilon, cosines, sines, query, all.dim);
            Stored* key = all.keys + all.cells[token];
            for (int64_t head = 0; head < all.kv_heads; head++, from += all.dim)
                turn(from, all.key_norm, all.epsilon, cosines, sines,
                     key + head * all.head_stride, all.dim);
            for (int64_t head = 0; head < all.kv_heads; head++, from += all.dim)
                std::memcpy(key + all.values + head * all.head_stride, from,
                            size_t(all.dim) * sizeof(Stored));
        }
    });
}

}  // namespace
}  // namespace hotbay

using hotbay::Bfloat;
using hotbay::Heads;

extern "C" void hotbay_rotate_and_store(int half, const void* qkv, const void* query_norm,
                                        const void* key_norm, float epsilon, const float* cosines,
                                        const float* sines, const int64_t* cells, void* keys,
                                        int64_t values, int64_t head_stride, void* queries,
                                        int64_t tokens, int64_t heads, int64_t kv_heads,
                                        int64_t dim) {
    if (half)
        hotbay::rotate_and_store(Heads<Bfloat>{
            (const Bfloat*)qkv, (const Bfloat*)query_norm, (const Bfloat*)key_norm, epsilon,
            cosines, sines, cells, (Bfloat*)keys, values, head_stride, (Bfloat*)queries, tokens,
            heads, kv_heads, dim});
    else
        hotbay::rotate_and_store(Heads<float>{
            (const float*)qkv, (const float*)query_norm, (const float*)key_norm, epsilon, cosines,
            sines, cells, (float*)keys, values, head_stride, (float*)queries, tokens, heads,
            kv_heads, dim});
}
