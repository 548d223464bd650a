// The warps of gemv_4bit_bulk that add up what others made.
#pragma once
#include "bulk.cuh"
#include "sigmoid.cuh"

#if HAS_ROOM

// Adds the warps' sums in ascending order of K, and those of the slices; each of the FINISHERS of eight rows of x. A
// lane has four rows of W and one of x; rows of x four apart, which two lanes beside each other have, lie in different
// banks.
template <typename T, typename S>
struct Finish {
    S& shared;
    const Products& products;
    int which, rows_x;
    float factor;
    Place<S::SIDE> place;
    T* out;
    const T* bias;
    bool adapted;

    __device__ void begin(const Walk&) const { wait_for_previous_kernel(); }
    __device__ void begin_slice(const Walk&, int, int) const {}
    __device__ void end() const {}

    __device__ void run(const Item& item) {
        const int m = which * MMA_ROWS + lane_id() / 4 % 2 * 4 + lane_id() / 8, r = lane_id() % 4 * 4;
        if (place.moves(products.weights, item.panel))
            read_part(m, r);
        const typename S::Buffer buffer(item.index);
        uint2 before[S::SIDE];
#pragma unroll
        for (int side = 0; side < S::SIDE; ++side)
            before[side] = load_residual(m, place.row(item.panel, r, side));
        shared.summed[buffer.place].wait(buffer.parity);
#pragma unroll
        for (int side = 0; side < S::SIDE; ++side) {
            const float4 sum = add(item, buffer.place, side, m, r);
            if (item.is_last) {
                float v[4] = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
                const int n = place.row(item.panel, r, side);
                finish(shared.share[buffer.place][S::ADAPTS ? m : 0] + r, m, n, v);
                if (products.residual.values != nullptr)
                    add_residual(before[side], m, n, v);
                if (!(place.gated && r >= HALF))
                    store4(m, n, v);
            }
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.taken[buffer.place].arrive();
    }

    __device__ void read_part(int m, int r) {
        out = static_cast<T*>(products.out[place.part]) + int64_t(blockIdx.y * S::TILE + m) * place.N;
        bias = static_cast<const T*>(products.bias[place.part][r / HALF]);
        adapted = products.adapters[place.part][r / HALF].rank > 0;
    }

    // Sums of rows of x that are not there are never used.
    __device__ float4 add(const Item& item, int buffer, int side, int m, int r) const {
        float4& kept = *reinterpret_cast<float4*>(&shared.kept[item.place][m][r]);
        float4 sum = item.is_first ? make_float4(0, 0, 0, 0) : kept;
        const auto sums = shared.sums[buffer] + side * S::PANEL_WARPS;
        float4 v[S::PANEL_WARPS];
#pragma unroll
        for (int warp = 0; warp < S::PANEL_WARPS; ++warp)
            v[warp] = warp * QUAD < item.blocks && m < rows_x ? *reinterpret_cast<const float4*>(&sums[warp][m][r])
                                                              : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int warp = 0; warp < S::PANEL_WARPS; ++warp)
            sum.x += v[warp].x, sum.y += v[warp].y, sum.z += v[warp].z, sum.w += v[warp].w;
        if (!item.is_last)
            kept = sum;
        return sum;
    }

    // The product gets its bias, its adapter's share and its gate.
    __device__ void finish(const float* share, int m, int n, float (&v)[4]) const {
        if (bias != nullptr) {
            float b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                b[i] = n + i < place.N ? widen(bias[n + i]) : 0.0f;
            add_rounded<T>(v, b);
        }
        if (S::ADAPTS && adapted && m < rows_x) {
            const float4 s = *reinterpret_cast<const float4*>(share);
            add_rounded<T>(v, {s.x, s.y, s.z, s.w});
        }
        if (place.gated) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float gate = rounded<T>(v[i]), up = __shfl_xor_sync(~0u, gate, 2);
                v[i] = silu<T>(gate) * up;
            }
        }
    }

    // N is a multiple of 16 beside a residual.
    __device__ uint2 load_residual(int m, int n) const {
        const T* values = static_cast<const T*>(products.residual.values);
        if (values == nullptr || m >= rows_x || n >= place.N)
            return make_uint2(0, 0);
        return *reinterpret_cast<const uint2*>(values + int64_t(blockIdx.y * S::TILE + m) * place.N + n);
    }

    // Four lanes have a panel's part of a row.
    __device__ void add_residual(uint2 before, int m, int n, float (&v)[4]) const {
        add_rounded<T>(v, {low<T>(before.x), high<T>(before.x), low<T>(before.y), high<T>(before.y)});
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            squares = fmaf(rounded<T>(v[i]), rounded<T>(v[i]), squares);
        squares += __shfl_xor_sync(FULL_WARP, squares, 1);
        squares += __shfl_xor_sync(FULL_WARP, squares, 2);
        if (lane_id() % 4 == 0 && m < rows_x && n < place.N)
            products.residual.squares[int64_t(blockIdx.y * S::TILE + m) * (place.N / PANEL) + n / PANEL] = squares;
    }

    __device__ void store4(int m, int n, const float (&v)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (m < rows_x && n + i < place.N)
                out[n + i] = narrow<T>(v[i]);
    }
};

#endif
