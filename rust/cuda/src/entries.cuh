// Codes of eight bits by one read. An entry stands for the scaled values that agree in their leading bits, among which
// one threshold may lie; the bits that follow are added to it and carry into the top byte, the code, above that
// threshold. Values are multiplied by 2^-103 before: what is too small for a code becomes zero, and three bits of the
// exponent are free.
#pragma once
#include "entry_tables.cuh"

__device__ inline uint32_t lowered(float scaled) {
    float low;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(low) : "f"(scaled), "f"(__uint_as_float(24u << 23)));
    return __float_as_uint(low);
}

// Of [-1, 1]; of -0 that of a negative value. Bits are flipped below zero, so that entries ascend.
__device__ inline uint32_t signed_code(const uint32_t* entries, float scaled) {
    const uint32_t bits = lowered(scaled), ordered = bits ^ int(bits) >> 31;
    return entries[ordered >> SIGNED_SHIFT & (SIGNED_ENTRIES - 1)] + (ordered << (24 - SIGNED_SHIFT));
}

// Of [0, 1], to which values are cut; none is -0.
__device__ inline uint32_t unsigned_code(const uint32_t* entries, float scaled) {
    const uint32_t bits = lowered(__saturatef(scaled));
    return entries[bits >> UNSIGNED_SHIFT] + (bits << (24 - UNSIGNED_SHIFT));
}

__device__ inline uint32_t top_bytes(const uint32_t (&x)[4]) {
    return __byte_perm(__byte_perm(x[0], x[1], 0x0073), __byte_perm(x[2], x[3], 0x0073), 0x5410);
}

// By all threads of a CTA.
template <int COUNT>
__device__ void copy_entries(uint32_t (&to)[COUNT], const uint32_t (&from)[COUNT]) {
#pragma unroll 4
    for (int i = threadIdx.x; i < COUNT / 4; i += blockDim.x)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}
