// What goes row by row: the norm behind a residual sum, and the gated activation.
#include "lanes.h"
#include "threads.h"

namespace hotbay {
namespace {

// residual += rows; out = residual / rms(residual), rounded as it would be stored, times weight.
template <typename Stored>
void add_rms_norm(Stored* residual, const Stored* rows, const Stored* weight, Stored* out,
                  int64_t count, int64_t width, float epsilon) {
    share(count, count * width, 1, [=](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            Stored* own = residual + row * width;
            const Stored* added = rows + row * width;
            Stored* result = out + row * width;
            for (int64_t at = 0; at < width; at += LANES)
                store(own + at, load(own + at, width - at) + load(added + at, width - at),
                      width - at);
            float scale = 1.0f / __builtin_sqrtf(squares(own, width) / float(width) + epsilon);
            for (int64_t at = 0; at < width; at += LANES) {
                Lanes scaled = rounded<Stored>(load(own + at, width - at) * scale);
                store(result + at, scaled * load(weight + at, width - at), width - at);
            }
        }
    });
}

// SiLU of a row's first half times its second.
template <typename Stored>
void gated_activation(const Stored* gate_up, Stored* out, int64_t count, int64_t width) {
    share(count, count * width, 1, [=](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            const Stored* gates = gate_up + row * 2 * width;
            Stored* result = out + row * width;
            for (int64_t at = 0; at < width; at += LANES) {
                Lanes gate = load(gates + at, width - at);
                Lanes up = load(gates + width + at, width - at);
                store(result + at, gate / (1.0f + exponential(-gate)) * up, width - at);
            }
        }
    });
}

}  // namespace
}  // namespace hotbay

using hotbay::Bfloat;

extern "C" void hotbay_add_rms_norm(int half, void* residual, const void* rows,
                                    const void* weight, void* out, int64_t count, int64_t width,
                                    float epsilon) {
    if (half)
        hotbay::add_rms_norm((Bfloat*)residual, (const Bfloat*)rows, (const Bfloat*)weight,
                             (Bfloat*)out, count, width, epsilon);
    else
        hotbay::add_rms_norm((float*)residual, (const float*)rows, (const float*)weight,
                             (float*)out, count, width, epsilon);
}

extern "C" void hotbay_gated_activation(int half, const void* gate_up, void* out, int64_t count,
                                        int64_t width) {
    if (half)
        hotbay::gated_activation((const Bfloat*)gate_up, (Bfloat*)out, count, width);
    else
        hotbay::gated_activation((const float*)gate_up, (float*)out, count, width);
}
