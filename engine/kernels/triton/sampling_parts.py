"""What the sampling kernels share: a row's fields, its random number, orders and weights of logits.

Owns functions of the device, not a kernel. Weights are whole numbers: the exponential of a logit's
distance to its row's largest, in units of 2^-44. Sums of whole numbers do not depend on their
order, so neither does a draw depend on how a row was cut up, and what a unit leaves out (2^-44 of
the likeliest token) is far below what float32 exponentials can tell.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.sampling_rows import OCCURS_IN_PROMPT, OFFSETS, ROW, Kind

VOCABULARY_MAX = 1 << 18
"""Weights of a row this long, at most 2^44 each, still sum within 63 bits."""
CHUNK = 2048
"""Logits of a row that one program looks at."""
LADDER = 16
"""Steps below the largest logit at which tokens are counted, to find a short list to search."""
CANDIDATES = 4096
"""Tokens of a short list; a row of more is searched whole."""

ROW_BYTES = tl.constexpr(ROW.itemsize)
SEED = tl.constexpr(OFFSETS["seed"])
POSITION = tl.constexpr(OFFSETS["position"])
TOP_P = tl.constexpr(OFFSETS["top_p"])
TEMPERATURE = tl.constexpr(OFFSETS["temperature"])
LOG_MIN_P = tl.constexpr(OFFSETS["log_min_p"])
REPETITION = tl.constexpr(OFFSETS["repetition"])
FREQUENCY = tl.constexpr(OFFSETS["frequency"])
PRESENCE = tl.constexpr(OFFSETS["presence"])
TOP_K = tl.constexpr(OFFSETS["top_k"])
OCCURRENCES = tl.constexpr(OFFSETS["occurrences"])
FIRST_EDIT = tl.constexpr(OFFSETS["first_edit"])
EDITS = tl.constexpr(OFFSETS["edits"])
KIND = tl.constexpr(OFFSETS["kind"])
LIKELIEST = tl.constexpr(OFFSETS["likeliest"])
NONE = tl.constexpr(int(Kind.NONE))
GREEDY = tl.constexpr(int(Kind.GREEDY))
RANDOM = tl.constexpr(int(Kind.RANDOM))
FILTERED = tl.constexpr(int(Kind.FILTERED))
COUNT_MASK = tl.constexpr(OCCURS_IN_PROMPT - 1)
WEIGHT_ONE = tl.constexpr(float(1 << 44))
FIRST_STEP = tl.constexpr(0.125)
MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)
LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def field(rows, row, FIELD: tl.constexpr, KIND_OF: tl.constexpr):
    """One field of a row, by its offset and type."""
    return tl.load((rows + row * ROW_BYTES + FIELD).to(tl.pointer_type(KIND_OF)))


@triton.jit
def weight_of(value, largest):
    """Whole-number weight of a logit; that of minus infinity is 0."""
    return (tl.exp(value - largest) * WEIGHT_ONE).to(tl.int64)


@triton.jit
def key_of(value):
    """An int32 in the order of float32 values; both zeros have the same."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 value of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ladder_values(largest, STEPS: tl.constexpr):
    """Logits at distances of 1/8, 1/8 sqrt(2), 1/4, ... below the largest: [STEPS]."""
    step = tl.arange(0, STEPS)
    return largest - FIRST_STEP * tl.exp2(step.to(tl.float32) * 0.5)


@triton.jit
def row_largest(peaks, row, chunks, CHUNKS: tl.constexpr):
    """The largest logit of a row, from those of its chunks."""
    chunk = tl.arange(0, CHUNKS)
    place = peaks + row * chunks + chunk
    return tl.max(tl.load(place, mask=chunk < chunks, other=float("-inf")), axis=0)


@triton.jit
def uniform_number(seed, position):
    """`engine.philox.uniform` of one (seed, position), both as 64 bits without sign: float64."""
    a, b = position & LOW_WORD, position >> 32
    c, d = a ^ a, a ^ a
    first, second = seed & LOW_WORD, seed >> 32
    for _ in range(10):
        left, right = a * MULTIPLIER_0, c * MULTIPLIER_1
        a, b, c, d = (
            (right >> 32) ^ b ^ first,
            right & LOW_WORD,
            (left >> 32) ^ d ^ second,
            left & LOW_WORD,
        )
        first, second = (first + WEYL_0) & LOW_WORD, (second + WEYL_1) & LOW_WORD
    bits = (a << 21) ^ (b >> 11)
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
