// The launch in front of gemv_4bit_bulk: the adapters' hidden values x A^T.
#pragma once
#include "bulk.cuh"
#include "bulk_roots.cuh"
#include "memory.cuh"
#include "norm.cuh"

constexpr int HIDDEN_THREADS = CHUNK / 16;
constexpr int FEW_ROWS = 4; // of x, that need no shared memory

#if HAS_ROOM

// sum + the products of eight values each.
template <typename T>
__device__ float dot8(float sum, const Raw8<T>& a, const Raw8<T>& b) {
    float of_a[8], of_b[8];
    a.unpack(of_a), b.unpack(of_b);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        sum = fmaf(of_a[i], of_b[i], sum);
    return sum;
}

// What one chunk of K gives to one hidden value, for every row of x, in shared memory: a thread's eights of A, of the
// norm's weight and of each row, which nobody else touches.
template <typename T>
struct HiddenShare {
    static constexpr int OF_WEIGHT = 1, OF_X = 2; // rows of shared memory behind that of A
    static constexpr int WARPS = HIDDEN_THREADS / 32;

    const Products& products;
    float (&sums)[MMA_ROWS][WARPS];
    int first; // element of K
    bool reads;

    __device__ static T* at(int row, int i) {
        extern __shared__ uint4 dynamic[];
        return reinterpret_cast<T*>(dynamic + (2 * row + i) * HIDDEN_THREADS + threadIdx.x);
    }

    __device__ static Raw8<T> load(int row, int i) {
        Raw8<T> raw;
        raw.load(at(row, i));
        return raw;
    }

    // From row `row` of a matrix.
    __device__ void copy(int to, const void* matrix, int row) const {
        const T* from = static_cast<const T*>(matrix) + int64_t(row) * products.weights.K + first;
        for (int i = 0; i < 2; ++i)
            copy16(at(to, i), from + i * 8);
    }

    // A's elements are rounded to x's dtype, as the layer uses them.
    __device__ void load_a(const Adapter& adapter) const {
        const int64_t begin = int64_t(blockIdx.x - adapter.column) * products.weights.K + first;
        float v[2][8] = {};
        if (reads && products.adapters_fp32)
            load16(static_cast<const float*>(adapter.a) + begin, v);
        else if (reads)
            load16(static_cast<const T*>(adapter.a) + begin, v);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Raw8<T> raw;
            raw.pack(v[i]);
            raw.store(at(0, i));
        }
    }

    template <typename A>
    __device__ static void load16(const A* from, float (&v)[2][8]) {
        load8(from, v[0]), load8(from + 8, v[1]);
    }

    // A few rows of x as they come from memory: less time to the first one.
    __device__ void dot_few() const {
#pragma unroll 2
        for (int m = 0; m < products.rows_x; ++m) {
            float dot = 0;
            if (reads) {
                const T* x = static_cast<const T*>(products.x) + int64_t(m) * products.weights.K + first;
                Raw8<T> of_x[2];
                of_x[0].load(x), of_x[1].load(x + 8);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    dot = dot8(dot, load(0, i), of_x[i]);
            }
            dot = warp_sum(dot);
            if (lane_id() == 0)
                sums[m][threadIdx.x / 32] = dot;
        }
    }

    // Rows of x that are normed, or more of them, come to shared memory together; with the same bits.
    __device__ void dot_many(float (&roots)[MMA_ROWS]) const {
        if (reads)
            for (int m = 0; m < products.rows_x; ++m)
                copy(OF_X + m, products.x, m);
        if (products.norm.weight != nullptr)
            make_roots(roots);
        wait_for_copies();
        if (reads && products.norm.weight != nullptr)
            norm(roots);
        float dots[MMA_ROWS] = {};
        if (reads)
#pragma unroll
            for (int m = 0; m < MMA_ROWS; ++m)
                if (m < products.rows_x)
#pragma unroll 1
                    for (int i = 0; i < 2; ++i) // one after the other, for want of registers
                        dots[m] = dot8(dots[m], load(0, i), load(OF_X + m, i));
        const float dot = warp_sums(dots);
        if (lane_id() % 4 == 0)
            sums[lane_id() / 4][threadIdx.x / 32] = dot;
    }

    __device__ void make_roots(float (&roots)[MMA_ROWS]) const {
        for (int m = threadIdx.x / 32; m < products.rows_x; m += WARPS) { // one at a time, for want of registers
            float root[1];
            roots_of(products, m, WARPS, root);
            if (lane_id() == 0)
                roots[m] = root[0];
        }
        __syncthreads();
    }

    __device__ void norm(const float (&roots)[MMA_ROWS]) const {
#pragma unroll 1
        for (int m = 0; m < products.rows_x; ++m)
#pragma unroll 1
            for (int i = 0; i < 2; ++i)
                multiplied(scaled(load(OF_X + m, i), roots[m]), load(OF_WEIGHT, i)).store(at(OF_X + m, i));
    }
};

// A and the norm's weight are here before x is.
template <typename T>
__device__ void make_hidden(const Products& products) {
    using Share = HiddenShare<T>;
    __shared__ float sums[MMA_ROWS][Share::WARPS], roots[MMA_ROWS];
    const int first = blockIdx.y * CHUNK + threadIdx.x * 16;
    const bool norms = products.norm.weight != nullptr;
    const Share share{products, sums, first, first < products.weights.K};
    if (share.reads && norms)
        share.copy(Share::OF_WEIGHT, products.norm.weight, 0);
    share.load_a(adapter_of(products, blockIdx.x));
    wait_for_previous_kernel();
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0)
        announce_end(products.arrived);
    if (norms || products.rows_x > FEW_ROWS)
        share.dot_many(roots);
    else
        share.dot_few();
    __syncthreads();
    if (const int m = threadIdx.x; m < products.rows_x) {
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < Share::WARPS; ++warp)
            sum += sums[m][warp];
        products.hidden[(int64_t(blockIdx.y) * products.rows_x + m) * products.ranks + blockIdx.x] = sum;
    }
}

#else

template <typename T>
__device__ void make_hidden(const Products&) {}

#endif
