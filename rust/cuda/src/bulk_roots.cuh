// The roots by which gemv_4bit_bulk norms x.
#pragma once
#include "norm.cuh"
#include "products.cuh"
#include "reduce.cuh"

// The reciprocal roots of the mean squares of rows `first`, `first` + `step` ... of x, by a warp; past the last row,
// the last one's. The order of a sum follows from K alone.
template <int COUNT>
__device__ void roots_of(const Products& products, int first, int step, float (&roots)[COUNT]) {
    const int K = products.weights.K, count = K / PANEL;
    float sums[COUNT] = {};
#pragma unroll 2
    for (int i = lane_id() * 4; i < count; i += 128)
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const int64_t row = min(first + n * step, products.rows_x - 1);
            const float4 v = *reinterpret_cast<const float4*>(products.norm.squares + row * count + i);
            sums[n] += (v.x + v.y) + (v.z + v.w);
        }
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
        roots[n] = reciprocal_root(warp_sum(sums[n]), K, products.norm.eps);
}
