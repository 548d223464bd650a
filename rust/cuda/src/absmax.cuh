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

__device__ inline RawScale load_scale(const Absmax& a, int64_t block) {
    if (a.codes == nullptr)
        return {__ldg(a.absmax + block), 0};
    return {__ldg(a.absmax + (block >> 8)), __ldg(a.codes + block)};
}

// Two roundings, never a fused multiply-add: absmax is one number in every kernel.
__device__ inline float decode_scale(const Absmax& a, RawScale raw) {
    if (a.codes == nullptr)
        return raw.absmax;
    return __fadd_rn(__fmul_rn(__ldg(a.map + raw.code), raw.absmax), a.offset);
}
