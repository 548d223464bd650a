// A panel of 16 rows of W as operand A of mma.m16n8k16, block of 64 by block, from the checkpoint's bytes.
//
// The contraction is permuted so that a lane's packed bytes feed A as they lie, and x is read in the same order.
#pragma once
#include "mma.cuh"
#include "pair_table.cuh"

constexpr int PANEL = 16; // rows of W of one mma
constexpr int TILE = 8;   // rows of x of one mma
constexpr int LINE = 256; // weights of a row in the 128 bytes that a warp takes at a time

// Sixteen bytes of one block a lane become eight of each of two blocks: lanes t and t ^ 2 exchange halves. Lane t then
// has the block's elements from 32 * (t % 2) + 16 * (t / 2) on.
__device__ inline void exchange(uint4 c, uint32_t (&words)[2][2]) {
    const bool low = lane_id() % 4 < 2;
    const uint32_t first = __shfl_xor_sync(FULL_WARP, low ? c.z : c.x, 2);
    const uint32_t second = __shfl_xor_sync(FULL_WARP, low ? c.w : c.y, 2);
    words[0][0] = low ? c.x : first, words[0][1] = low ? c.y : second;
    words[1][0] = low ? first : c.z, words[1][1] = low ? second : c.w;
}

#if __CUDA_ARCH__ >= 800

// sum += one block of the panel times x; `upper` is of rows 0..7, `lower` of rows 8..15.
template <typename T>
__device__ void multiply_block(const uint32_t (&upper)[2], const uint32_t (&lower)[2], const uint4 (&b)[2],
                               const Table& table, float (&sum)[4]) {
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        const uint32_t u = upper[word], l = lower[word];
        const uint32_t a0[4] = {table.pair(u, 0), table.pair(l, 0), table.pair(u, 1), table.pair(l, 1)};
        const uint32_t a1[4] = {table.pair(u, 2), table.pair(l, 2), table.pair(u, 3), table.pair(l, 3)};
        multiply_add(T{}, sum, a0, b[word].x, b[word].y);
        multiply_add(T{}, sum, a1, b[word].z, b[word].w);
    }
}

// total += scale * sum
__device__ inline void add_scaled(float (&total)[4], float upper, float lower, const float (&sum)[4]) {
    total[0] = __fmaf_rn(upper, sum[0], total[0]);
    total[1] = __fmaf_rn(upper, sum[1], total[1]);
    total[2] = __fmaf_rn(lower, sum[2], total[2]);
    total[3] = __fmaf_rn(lower, sum[3], total[3]);
}

#endif

// Where a warp's sums of a panel lie, [row][row of x].
constexpr int PARTIAL = PANEL * TILE;

__device__ inline void store_partial(float* partial, const float (&total)[4]) {
    float2* to = reinterpret_cast<float2*>(partial) + lane_id();
    to[0] = make_float2(total[0], total[1]);
    to[PARTIAL / 4] = make_float2(total[2], total[3]);
}
