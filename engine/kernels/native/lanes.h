// Sixteen numbers at a time, and how they come from and go to memory.
//
// GCC's vector types: sixteen floats are one register with AVX-512 and two with AVX2. Everything is
// computed in float; Bfloat is what memory holds where the model is in bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace hotbay {

constexpr int64_t LANES = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t BitLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

struct Bfloat {
    uint16_t bits;
};

INLINE Lanes widened(HalfLanes halves) {
    return (Lanes)(__builtin_convertvector(halves, BitLanes) << 16);
}

// To the nearest bfloat16, ties to even; what is no number stays none.
INLINE HalfLanes narrowed(Lanes lanes) {
    BitLanes bits = (BitLanes)lanes;
    BitLanes nearest = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((lanes == lanes ? nearest : bits | 0x400000) >> 16, HalfLanes);
}

INLINE Lanes load(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

INLINE Lanes load(const Bfloat* from) {
    HalfLanes halves;
    std::memcpy(&halves, from, sizeof halves);
    return widened(halves);
}

INLINE void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

INLINE void store(Bfloat* to, Lanes lanes) {
    HalfLanes halves = narrowed(lanes);
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` of sixteen, or all of them if there are more; the rest is zero.
template <typename Stored>
INLINE Lanes load(const Stored* from, int64_t count) {
    if (count >= LANES) return load(from);
    Stored some[LANES] = {};
    std::memcpy(some, from, size_t(count) * sizeof(Stored));
    return load(some);
}

template <typename Stored>
INLINE void store(Stored* to, Lanes lanes, int64_t count) {
    if (count >= LANES) return store(to, lanes);
    Stored some[LANES];
    store(some, lanes);
    std::memcpy(to, some, size_t(count) * sizeof(Stored));
}

// As they are once they were in memory.
template <typename Stored>
INLINE Lanes rounded(Lanes lanes) {
    return sizeof(Stored) == sizeof(float) ? lanes : widened(narrowed(lanes));
}

// Less nothing: plus nothing would be an addition, which makes 0 of -0.
INLINE Lanes all(float number) { return number - Lanes{}; }

// Keeps the compiler from reading it from memory again wherever it is used.
INLINE void in_register(Lanes& lanes) {
#if defined(__AVX512F__)
    asm("" : "+v"(lanes));
#else
    (void)lanes;
#endif
}

INLINE float sum(Lanes lanes) {
    float numbers[LANES];
    store(numbers, lanes);
    for (int64_t width = LANES / 2; width; width /= 2)
        for (int64_t lane = 0; lane < width; lane++) numbers[lane] += numbers[lane + width];
    return numbers[0];
}

// The sum of squares, in an order that follows from `count` alone.
template <typename Stored>
INLINE float squares(const Stored* numbers, int64_t count) {
    Lanes each = Lanes{};
    for (int64_t at = 0; at < count; at += LANES) {
        Lanes some = load(numbers + at, count - at);
        each += some * some;
    }
    return sum(each);
}

// e^x within 2 units in the last place: 2^n times the Taylor series over +-ln(2)/2, seven powers of
// which reach float's precision there. Below -87 it is what it is at -87, no denormal; from 88.4 on
// it is infinite, as 2^128 is.
INLINE Lanes exponential(Lanes x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 89.0f ? all(89.0f) : x;
    const float nearest = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole
    Lanes whole = (x * 1.44269504f + nearest) - nearest;
    Lanes rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Lanes power = rest * (1.0f / 5040) + 1.0f / 720;
    power = power * rest + 1.0f / 120;
    power = power * rest + 1.0f / 24;
    power = power * rest + 1.0f / 6;
    power = power * rest + 0.5f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    return power * (Lanes)((__builtin_convertvector(whole, IntLanes) + 127) << 23);
}

}  // namespace hotbay
