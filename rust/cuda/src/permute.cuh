// The order of x in which the bytes of W feed a contraction.
#pragma once
#include <stdint.h>

// Sixteen bytes: the pairs of elements that one step of the contraction takes of a block of 64.
__device__ inline void permute_chunk(const uint32_t* x, uint4* out, int64_t i) {
    const uint32_t* from = x + i / 8 * 32 + i % 8;
    out[i] = make_uint4(from[0], from[8], from[16], from[24]);
}
