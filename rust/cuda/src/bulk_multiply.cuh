// The warps of gemv_4bit_bulk that multiply codes.
#pragma once
#include "bulk.cuh"
#include "bulk_roots.cuh"
#include "memory.cuh"
#include "norm.cuh"

#if HAS_ROOM

template <typename T, typename S>
struct Multiply {
    static constexpr int TILES = S::TILE / MMA_ROWS;

    S& shared;
    const Products& products;
    const Table& table;
    int warp, rows_x;
    uint4 (&fragments)[QUAD][TILES][2];

    __device__ void begin(const Walk& walk) const {
        if (products.norm.weight != nullptr)
            copy_norm(walk.blocks);
        wait_for_x();
    }
    __device__ void begin_slice(const Walk&, int block, int blocks) const {
        load_slice(block, blocks);
        if (products.norm.weight == nullptr)
            return;
        if (block == 0)
            make_roots();
        if (first() < blocks)
            norm_slice(block);
    }
    __device__ void end() const {}

    // Beside adapters x is there before the launch in front, which makes the hidden values, has ended.
    __device__ void wait_for_x() const {
        if constexpr (!S::ADAPTS) {
            wait_for_previous_kernel();
        } else {
            if (threadIdx.x == 0)
                wait_for_announced_end(products.arrived, gridDim.x);
            S::multipliers_meet();
        }
    }

    // The norm's weight lies behind everything else.
    __device__ T* norm_weight(int block) const { return reinterpret_cast<T*>(&shared + 1) + block * 64; }

    // What the warp will use of it, four blocks of each slice; zeros past the last.
    __device__ void copy_norm(int blocks) const {
        const T* weight = static_cast<const T*>(products.norm.weight);
        for (int quad = first(); quad < blocks; quad += products.weights.slice) {
            const int block = quad + lane_id() / 8, at = lane_id() % 8 * 8;
            if (block < blocks)
                copy16(norm_weight(block) + at, weight + block * 64 + at);
            else
                Raw8<T>{}.store(norm_weight(block) + at);
        }
    }

    // Elements in the order in which the bytes of W feed the contraction; zeros where x has no row or block.
    __device__ void load_slice(int block, int blocks) const {
        const int g = lane_id() / 4;
        const T* x = static_cast<const T*>(products.x) + int64_t(blockIdx.y * S::TILE + g) * products.weights.K;
        x += (block + first()) * 64 + lane_id() % 4 * 16;
#pragma unroll
        for (int n = 0; n < TILES; ++n, x += int64_t(MMA_ROWS) * products.weights.K) {
            const uint4* from = reinterpret_cast<const uint4*>(x);
            const int there = n * MMA_ROWS + g < rows_x ? blocks - first() : 0;
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    fragments[j][n][i] = j < there ? from[j * 8 + i] : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ void norm_slice(int block) const {
        const T* weight = norm_weight(block + first()) + lane_id() % 4 * 16;
#pragma unroll
        for (int j = 0; j < QUAD; ++j) {
            Raw8<T> of_weight[2];
            of_weight[0].load(weight + j * 64), of_weight[1].load(weight + j * 64 + 8);
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const float root = shared.roots[n * MMA_ROWS + lane_id() / 4];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    fragments[j][n][i] = multiplied(scaled(Raw8<T>{fragments[j][n][i]}, root), of_weight[i]).words;
            }
            __syncwarp(); // one block after the other: there are no registers for more
        }
    }

    __device__ void make_roots() const {
        constexpr int EACH = S::TILE > S::WARPS ? S::TILE / S::WARPS : 1; // rows, of one warp
        if (warp < S::TILE) {
            float roots[EACH];
            roots_of(products, blockIdx.y * S::TILE + warp, S::WARPS, roots);
#pragma unroll
            for (int n = 0; n < EACH; ++n)
                if (lane_id() == 0)
                    shared.roots[warp + n * S::WARPS] = roots[n];
        }
        wait_for_copies();
        S::multipliers_meet();
    }

    __device__ void run(const Item& item) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
        const bool works = first() < item.blocks;
        uint2 upper[QUAD], lower[QUAD]; // codes of rows g and g + 8
        float4 upper_scales, lower_scales;
        const typename S::Stage stage(item.index);
        shared.full[stage.place].wait(stage.parity);
        if (works) {
            const int row_bytes = S::SIDE == 1 ? S::ROW_BYTES : item.blocks * 32;
            const uint8_t* from = &shared.codes[stage.place][g][warp * QUAD * 32 + t * 8];
            if constexpr (S::SIDE > 1)
                from = shared.panel(stage.place, warp / S::PANEL_WARPS) + g * row_bytes + first() * 32 + t * 8;
#pragma unroll
            for (int j = 0; j < QUAD; ++j) {
                upper[j] = *reinterpret_cast<const uint2*>(from + j * 32);
                lower[j] = *reinterpret_cast<const uint2*>(from + 8 * row_bytes + j * 32);
            }
            upper_scales = *reinterpret_cast<const float4*>(&shared.scales[stage.place][g][warp * QUAD]);
            lower_scales = *reinterpret_cast<const float4*>(&shared.scales[stage.place][g + 8][warp * QUAD]);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.empty[stage.place].arrive();
        float total[TILES][4] = {};
        if (works) {
            const float up[QUAD] = {upper_scales.x, upper_scales.y, upper_scales.z, upper_scales.w};
            const float low[QUAD] = {lower_scales.x, lower_scales.y, lower_scales.z, lower_scales.w};
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
                multiply_block(upper[j], lower[j], up[j], low[j], fragments[j], total);
        }
        const typename S::Buffer buffer(item.index);
        shared.taken[buffer.place].wait(buffer.parity ^ 1);
#pragma unroll
        for (int n = 0; n < TILES; ++n)
            store_sums(shared.sums[buffer.place][warp] + n * MMA_ROWS, total[n], rows_x - n * MMA_ROWS);
        __syncwarp();
        if (lane_id() == 0)
            shared.summed[buffer.place].arrive();
    }

    // Of the warp's blocks in a slice of its panel.
    __device__ int first() const { return (S::SIDE == 1 ? warp : warp % S::PANEL_WARPS) * QUAD; }

    __device__ void multiply_block(uint2 upper, uint2 lower, float up, float low, const uint4 (&b)[TILES][2],
                                   float (&total)[TILES][4]) const {
        float sum[TILES][4] = {};
#pragma unroll
        for (int word = 0; word < 2; ++word) {
            const uint32_t u = word ? upper.y : upper.x, l = word ? lower.y : lower.x;
            const uint32_t a0[4] = {table.pair(u, 0), table.pair(l, 0), table.pair(u, 1), table.pair(l, 1)};
            const uint32_t a1[4] = {table.pair(u, 2), table.pair(l, 2), table.pair(u, 3), table.pair(l, 3)};
#pragma unroll
            for (int n = 0; n < TILES; ++n)
                multiply_add(T{}, sum[n], a0, b[n][word].x, b[n][word].y);
#pragma unroll
            for (int n = 0; n < TILES; ++n)
                multiply_add(T{}, sum[n], a1, b[n][word].z, b[n][word].w);
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            total[n][0] = __fmaf_rn(up, sum[n][0], total[n][0]);
            total[n][1] = __fmaf_rn(up, sum[n][1], total[n][1]);
            total[n][2] = __fmaf_rn(low, sum[n][2], total[n][2]);
            total[n][3] = __fmaf_rn(low, sum[n][3], total[n][3]);
        }
    }
};

#endif
