// Attention of one query per sequence over keys and values in their pages.
//
// Keys and values are read where they lie, once for the query heads that share them; the floor is
// their bytes. A head of a sequence is one piece of work, and its numbers follow from that sequence
// alone: the same bit for bit beside any others. Scores are kept for the whole sequence, so that
// the largest is known before the first is raised to a power. What lies behind a sequence's end is
// never read.
#include <vector>

#include "lanes.h"
#include "threads.h"
#include "transpose.h"

namespace hotbay {
namespace {

constexpr float NOTHING = -__builtin_inff();
constexpr int64_t TOGETHER = 4;  // queries that a key is read once for
constexpr int64_t AHEAD = 4 * LANES;  // positions between what is fetched and what is computed

template <typename Stored>
struct Decodes {
    const Stored* queries;   // [sequences][heads][dim]
    const Stored* keys;      // of the layer, that `tables` counts from
    int64_t values;          // elements from a key to its value
    const int64_t* tables;   // [sequences][blocks], where a block begins
    const int64_t* firsts;   // [sequences], the first position that is seen, within the table
    const int64_t* ends;     // [sequences], the position behind the last, within the table
    int64_t blocks;
    int64_t slots_bits;      // a block has 2^slots_bits positions
    int64_t head_stride;     // elements between heads of a block
    Stored* out;             // [sequences][heads * dim]
    int64_t sequences, heads, kv_heads;
};

// Where one head of one sequence lies.
template <typename Stored, int CHUNKS>
struct Lying {
    const Stored* keys;
    const int64_t* table;
    int64_t slots_bits, first, end;

    INLINE const Stored* at(int64_t position) const {
        int64_t slot = position & ((int64_t(1) << slots_bits) - 1);
        return keys + table[position >> slots_bits] + slot * (CHUNKS * LANES);
    }
};

// Begins to fetch what comes AHEAD positions after `position`: of these, or of what is read next.
template <typename Stored, int CHUNKS>
INLINE void fetch(const Lying<Stored, CHUNKS>& these, const Lying<Stored, CHUNKS>& next,
                  int64_t position) {
    int64_t ahead = position + AHEAD, beyond = next.first + ahead - these.end;
    if (ahead >= these.end && beyond >= next.end) return;
    const char* line = (const char*)(ahead < these.end ? these.at(ahead) : next.at(beyond));
#pragma GCC unroll 16
    for (size_t at = 0; at < CHUNKS * LANES * sizeof(Stored); at += 64)
        __builtin_prefetch(line + at);
}

// Products of queries and keys, to scores[query][position] from the first whole sixteen on.
template <typename Stored, int CHUNKS, int QUERIES>
INLINE void score(const Lying<Stored, CHUNKS>& keys, const Lying<Stored, CHUNKS>& next,
                  const float* queries, float* scores, int64_t room) {
    Lanes own[QUERIES][CHUNKS];
    for (int query = 0; query < QUERIES; query++)
        for (int chunk = 0; chunk < CHUNKS; chunk++)
            own[query][chunk] = load(queries + (query * CHUNKS + chunk) * LANES);
    for (int64_t at = keys.first / LANES * LANES; at < keys.end; at += LANES) {
        Lanes products[QUERIES][LANES];
        const Stored* run = keys.at(at);
        bool whole = keys.slots_bits >= 4 && at + LANES <= keys.end;
        for (int64_t slot = 0; slot < LANES; slot++, run += CHUNKS * LANES) {
            const Stored* key = run;
            if (!whole) key = keys.at(at + slot < keys.end ? at + slot : keys.end - 1);
            fetch(keys, next, at + slot);
#pragma GCC unroll 4
            for (int query = 0; query < QUERIES; query++)
                products[query][slot] = load(key) * own[query][0];
#pragma GCC unroll 16
            for (int chunk = 1; chunk < CHUNKS; chunk++) {
                Lanes part = load(key + chunk * LANES);
#pragma GCC unroll 4
                for (int query = 0; query < QUERIES; query++)
                    products[query][slot] += part * own[query][chunk];
            }
        }
        for (int query = 0; query < QUERIES; query++)
            store(scores + query * room + at, row_sums(products[query]));
    }
}

// Scores to weights, not yet divided by their sum, which is returned.
INLINE float weigh(float* scores, int64_t first, int64_t end) {
    int64_t begin = first / LANES * LANES, behind = (end + LANES - 1) / LANES * LANES;
    for (int64_t at = begin; at < first; at++) scores[at] = NOTHING;
    for (int64_t at = end; at < behind; at++) scores[at] = NOTHING;
    Lanes largest = all(NOTHING), total = Lanes{};
    for (int64_t at = begin; at < behind; at += LANES) {
        Lanes some = load(scores + at);
        largest = some > largest ? some : largest;
    }
    float most = NOTHING;
    for (int lane = 0; lane < LANES; lane++) most = largest[lane] > most ? largest[lane] : most;
    for (int64_t at = begin; at < behind; at += LANES) {
        Lanes weights = exponential(load(scores + at) - most);
        store(scores + at, weights);
        total += weights;
    }
    return sum(total);
}

// Values weighted and summed, to out[query].
template <typename Stored, int CHUNKS, int QUERIES>
INLINE void mix(const Lying<Stored, CHUNKS>& values, const Lying<Stored, CHUNKS>& next,
                const float* weights, int64_t room, const float* totals, Stored* out) {
    constexpr int PART = QUERIES * CHUNKS <= 16 ? CHUNKS : (CHUNKS + 1) / 2 * QUERIES <= 16
                             ? (CHUNKS + 1) / 2 : 4;  // of a value at once: what registers hold
    for (int part = 0; part < CHUNKS; part += PART) {
        Lanes mixed[QUERIES][PART] = {};
        for (int64_t at = values.first; at < values.end; at++) {
            const Stored* value = values.at(at) + part * LANES;
            if (part == 0) fetch(values, next, at);
#pragma GCC unroll 16
            for (int chunk = 0; chunk < PART; chunk++) {
                if (part + chunk >= CHUNKS) break;
                Lanes some = load(value + chunk * LANES);
#pragma GCC unroll 4
                for (int query = 0; query < QUERIES; query++)
                    mixed[query][chunk] += some * weights[query * room + at];
            }
        }
        for (int query = 0; query < QUERIES; query++)
            for (int chunk = 0; chunk < PART && part + chunk < CHUNKS; chunk++)
                store(out + (query * CHUNKS + part + chunk) * LANES,
                      mixed[query][chunk] * (1.0f / totals[query]));
    }
}

template <typename Stored, int CHUNKS>
struct Piece {
    Lying<Stored, CHUNKS> keys, values;
    const Stored* queries;
    Stored* out;

    Piece(const Decodes<Stored>& all, int64_t piece) {
        int64_t sequence = piece / all.kv_heads, head = piece % all.kv_heads;
        int64_t first = (sequence * all.heads + head * (all.heads / all.kv_heads)) * CHUNKS * LANES;
        keys = {all.keys + head * all.head_stride, all.tables + sequence * all.blocks,
                all.slots_bits, all.firsts[sequence], all.ends[sequence]};
        values = keys;
        values.keys += all.values;
        queries = all.queries + first;
        out = all.out + first;
    }
};

template <typename Stored, int CHUNKS, int QUERIES>
INLINE void attend_some(const Piece<Stored, CHUNKS>& piece, const Lying<Stored, CHUNKS>& next,
                        int64_t query, float* scores, int64_t room) {
    const float scale = 1.0f / __builtin_sqrtf(float(CHUNKS * LANES));
    const Stored* queries = piece.queries + query * CHUNKS * LANES;
    float scaled[QUERIES * CHUNKS * LANES], totals[QUERIES];
    for (int64_t at = 0; at < QUERIES * CHUNKS * LANES; at += LANES)
        store(scaled + at, load(queries + at) * scale);
    score<Stored, CHUNKS, QUERIES>(piece.keys, piece.values, scaled, scores, room);
    for (int one = 0; one < QUERIES; one++)
        totals[one] = weigh(scores + one * room, piece.keys.first, piece.keys.end);
    mix<Stored, CHUNKS, QUERIES>(piece.values, next, scores, room, totals,
                                 piece.out + query * CHUNKS * LANES);
}

template <typename Stored, int CHUNKS>
void attend(const Decodes<Stored>& all) {
    int64_t pieces = all.sequences * all.kv_heads, group = all.heads / all.kv_heads;
    int64_t room = ((all.blocks << all.slots_bits) + LANES - 1) / LANES * LANES;
    deal(pieces, pieces * room * CHUNKS * LANES, [&](int64_t number, int64_t following) {
        static thread_local std::vector<float> scores;
        if (int64_t(scores.size()) < TOGETHER * room) scores.resize(size_t(TOGETHER * room));
        Piece<Stored, CHUNKS> piece(all, number);
        Lying<Stored, CHUNKS> next = Piece<Stored, CHUNKS>(
            all, following < pieces ? following : number).keys;
        for (int64_t query = 0, taken; query < group; query += taken) {
            int64_t left = group - query;
            taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            const auto& then = taken < left ? piece.keys : next;
            if (taken == 4) attend_some<Stored, CHUNKS, 4>(piece, then, query, scores.data(), room);
            if (taken == 2) attend_some<Stored, CHUNKS, 2>(piece, then, query, scores.data(), room);
            if (taken == 1) attend_some<Stored, CHUNKS, 1>(piece, then, query, scores.data(), room);
        }
    });
}

template <typename Stored>
int attend_any(const Decodes<Stored>& all, int64_t dim) {
    switch (dim) {
        case 16: attend<Stored, 1>(all); return 1;
        case 32: attend<Stored, 2>(all); return 1;
        case 48: attend<Stored, 3>(all); return 1;
        case 64: attend<Stored, 4>(all); return 1;
        case 80: attend<Stored, 5>(all); return 1;
        case 96: attend<Stored, 6>(all); return 1;
        case 128: attend<Stored, 8>(all); return 1;
        case 256: attend<Stored, 16>(all); return 1;
    }
    return 0;
}

}  // namespace
}  // namespace hotbay

using hotbay::Bfloat;
using hotbay::Decodes;

// 1 where heads of `dim` are attended to, 0 where they are not and nothing was done.
extern "C" int hotbay_attend(int half, const void* queries, const void* keys, int64_t values,
                             const int64_t* tables, const int64_t* firsts, const int64_t* ends,
                             int64_t blocks, int64_t slots_bits, int64_t head_stride, void* out,
                             int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim) {
    if (half)
        return hotbay::attend_any(
            Decodes<Bfloat>{(const Bfloat*)queries, (const Bfloat*)keys, values, tables, firsts,
                            ends, blocks, slots_bits, head_stride, (Bfloat*)out, sequences, heads,
                            kv_heads},
            dim);
    return hotbay::attend_any(
        Decodes<float>{(const float*)queries, (const float*)keys, values, tables, firsts, ends,
                       blocks, slots_bits, head_stride, (float*)out, sequences, heads, kv_heads},
        dim);
}
