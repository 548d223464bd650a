// The scale of a block: plain fp32, or one byte per block (double quantization) decoded in place.
#pragma once
#include <stdint.h>

// Laid out as the launcher's `DeviceAbsmax`.
struct Absmax {
    const uint8_t* codes; // u8 [blocks], null when absmax is plain
    const float* absmax;  // f32 [blocks], or nested: f32 [ceil(blocks / 256)]
    const float* map;     // f32 [256], null when absmax is plain
    float offset;
};

// What memory holds for one block; decoding it later keeps the loads in flight.
struct RawScale {
    float absmax;
    uint32_t code;
};

// Selected addresses instead of branches: the loads of several blocks stay side by side.
template <typename Index>
__device__ RawScale load_scale(const Absmax& a, Index block) {
    const bool nested = a.codes != nullptr;
    return {__ldg(a.absmax + (nested ? block >> 8 : block)), nested ? __ldg(a.codes + block) : 0u};
}

// Two roundings, never a fused multiply-add: absmax is one number in every kernel.
__device__ inline float decode_scale(const Absmax& a, RawScale raw) {
    if (a.codes == nullptr)
        return raw.absmax;
    return __fadd_rn(__fmul_rn(__ldg(a.map + raw.code), raw.absmax), a.offset);
}
