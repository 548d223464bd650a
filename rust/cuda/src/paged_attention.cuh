// What the attention kernels share: where a row's tokens lie, how its context is cut, and how the parts meet.
#pragma once
#include "memory.cuh"
#include "overlap.cuh"
#include "reduce.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK = 16;
constexpr int MAX_PARTS = 32;
constexpr int MIN_PART = 256;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.4028235e38f; // below every score, and its difference from one is a number

// group: query heads of a key head; tiles: CTAs that share its tokens.
struct Shape {
    int heads, kv_heads, group, tiles, D, blocks, table, window;
};

// C: what the cache holds, T itself or codes of 8 bits, which have a scale for each token and head.
template <typename T, typename C>
struct Tensors {
    const T* q;          // [B, heads, D]
    const T* k;          // [B, kv_heads, D]
    const T* v;          // [B, kv_heads, D]
    const T* cos;        // [B, D]
    const T* sin;        // [B, D]
    const int* tables;   // [B, table]
    const int* lengths;  // [B]
    C* keys;             // [blocks, BLOCK, kv_heads, D]
    C* values;           // [blocks, BLOCK, kv_heads, D]
    float* key_scales;   // [blocks, kv_heads, BLOCK], of codes only
    float* value_scales; // [blocks, kv_heads, BLOCK], of codes only
    float* partials;     // [B, heads, MAX_PARTS, D], then their weights and largest scores
    int* arrived;        // [B, heads], zeros
    T* out;              // [B, heads, D]
};

// exp2f without its care for results below 2^-126, which are zeros here.
__device__ inline float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Element i of x [D] rotated, in x's dtype.
template <typename T>
__device__ T rotate(const T* x, const T* cos, const T* sin, int i, int D) {
    const int partner = i < D / 2 ? i + D / 2 : i - D / 2;
    const float a = __fmul_rn(widen(x[i]), widen(cos[i])), b = __fmul_rn(widen(x[partner]), widen(sin[i]));
    return narrow<T>(__fadd_rn(rounded<T>(a), rounded<T>(b)));
}

// A row's context, cut by its own length, so that its result depends on nothing else. Parts begin with blocks.
struct Cut {
    int first, length, part_size, parts;

    Cut() = default;
    // Up to `most_parts`, of at least `smallest` tokens.
    __device__ Cut(int length_, int most, int window, int smallest, int most_parts)
        : length(max(0, min(length_, most))) {
        first = window > 0 ? max(0, length - window) : 0;
        const int span = length - start(), cut = (span + most_parts - 1) / most_parts;
        part_size = max(1, (cut + smallest - 1) / smallest) * smallest;
        // Nearly all contexts are spared a division.
        parts = part_size == smallest ? (span + smallest - 1) / smallest : (span + part_size - 1) / part_size;
    }
    __device__ int start() const { return first / BLOCK * BLOCK; }
    __device__ int begin(int part) const { return max(first, start() + part * part_size); }
    __device__ int end(int part) const { return min(start() + (part + 1) * part_size, length); }
};

// One warp: to [D] = 128 + x / scale; the scale gives the largest element 127 of them.
template <int MAX_D, typename X>
__device__ void encode(const X& x, int D, uint8_t* to, float* scale_to) {
    constexpr int MOST = MAX_D / 32;
    float own[MOST];
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        own[i] = lane_id() + 32 * i < D ? x(lane_id() + 32 * i) : 0.0f;
        largest = max(largest, magnitude(own[i]));
    }
    // NaN or Inf in the scale is what is left of one in x.
    const float scale = __fdiv_rn(__uint_as_float(lanes_max(largest, 32)), 127.0f);
#pragma unroll
    for (int i = 0; i < MOST; ++i)
        if (lane_id() + 32 * i < D)
            to[lane_id() + 32 * i] = uint8_t(128 + max(-127, min(__float2int_rn(__fdiv_rn(own[i], scale)), 127)));
    if (lane_id() == 0)
        *scale_to = scale;
}

// The heads of a CTA: at most G of those that share a key head, in one row.
template <typename T, typename C, int G>
struct Tile {
    const Tensors<T, C>& x;
    const Shape& shape;
    int row, kv_head, first_head, heads;

    __device__ Tile(const Tensors<T, C>& x_, const Shape& shape_) : x(x_), shape(shape_) {
        row = blockIdx.z, kv_head = shape.tiles == 1 ? blockIdx.y : blockIdx.y / shape.tiles;
        const int tile = blockIdx.y - kv_head * shape.tiles;
        first_head = kv_head * shape.group + tile * G, heads = min(G, shape.group - tile * G);
    }

    __device__ int64_t first() const { return int64_t(row) * shape.heads + first_head; }
    __device__ int token_stride() const { return shape.kv_heads * shape.D; }
    // Of the row's token t, among all tokens of the cache.
    __device__ int slot(int t) const {
        const int listed = __ldcg(x.tables + int64_t(row) * shape.table + t / BLOCK);
        return max(0, min(listed, shape.blocks - 1)) * BLOCK + t % BLOCK;
    }
    // Where a slot's key or value begins.
    __device__ int64_t element(int slot) const { return int64_t(slot) * token_stride() + kv_head * shape.D; }
    // Where a slot's scale lies.
    __device__ int64_t scale(int slot) const {
        return (int64_t(slot / BLOCK) * shape.kv_heads + kv_head) * BLOCK + slot % BLOCK;
    }
    // Not through L1, which may be out of date once this kernel has waited for the one before it.
    __device__ int length() const { return __ldcg(x.lengths + row); }
    __device__ Cut cut(int length) const { return Cut(length, shape.table * BLOCK, shape.window, MIN_PART, MAX_PARTS); }

    // Length and table are nearly always known before the kernel before this one has ended; what they name is moved
    // to L2 meanwhile.
    __device__ Cut wait() const {
        const int guess = length();
        prefetch(cut(guess), blockIdx.x);
        wait_for_previous_kernel();
        return cut(length());
    }

    __device__ void prefetch(const Cut& cut, int part) const {
        if (part >= cut.parts)
            return;
        for (int t = cut.begin(part) + threadIdx.x; t < cut.end(part); t += THREADS) {
            const int64_t at = element(slot(t));
            for (int i = 0; i < shape.D; i += 128 / sizeof(C))
                prefetch_l2(x.keys + at + i), prefetch_l2(x.values + at + i);
            if (sizeof(C) == 1 && t % BLOCK == 0)
                prefetch_l2(x.key_scales + scale(slot(t))), prefetch_l2(x.value_scales + scale(slot(t)));
        }
    }

    __device__ T query(int head, int d) const {
        return rotate(x.q + (first() + head) * shape.D, x.cos + int64_t(row) * shape.D, x.sin + int64_t(row) * shape.D,
                      d, shape.D);
    }

    // The new token as the cache holds it.
    template <int MAX_D>
    __device__ void make_new(C* key, C* value, float* key_scale, float* value_scale) const {
        const T* k = x.k + (int64_t(row) * shape.kv_heads + kv_head) * shape.D;
        const T* v = x.v + (int64_t(row) * shape.kv_heads + kv_head) * shape.D;
        const T *cos = x.cos + int64_t(row) * shape.D, *sin = x.sin + int64_t(row) * shape.D;
        if constexpr (sizeof(C) == 1) {
            if (threadIdx.x / 32 == 0)
                encode<MAX_D>([&](int i) { return widen(rotate(k, cos, sin, i, shape.D)); }, shape.D, key, key_scale);
            if (threadIdx.x / 32 == 1)
                encode<MAX_D>([&](int i) { return widen(v[i]); }, shape.D, value, value_scale);
        } else {
            for (int i = threadIdx.x; i < shape.D; i += THREADS)
                key[i] = rotate(k, cos, sin, i, shape.D), value[i] = v[i];
        }
    }

    __device__ void store_zeros() const {
        for (int i = threadIdx.x; i < heads * shape.D; i += THREADS)
            x.out[first() * shape.D + i] = narrow<T>(0.0f);
    }
};

// Where the sums of a CTA's warps, and then those of a row's parts, meet; in a fixed order.
template <int G, int MAX_D>
struct alignas(16) Meeting {
    float sums[WARPS][G][MAX_D];
    float largest[WARPS][G], weights[WARPS][G], factors[G][MAX_PARTS];
    bool last;

    template <typename T, typename C>
    __device__ float* sums_of_parts(const Tile<T, C, G>& tile) const {
        return tile.x.partials + tile.first() * MAX_PARTS * tile.shape.D;
    }

    template <typename T, typename C>
    __device__ float2* scales_of_parts(const Tile<T, C, G>& tile) const {
        const int64_t heads = int64_t(gridDim.z) * tile.shape.heads;
        return reinterpret_cast<float2*>(tile.x.partials + heads * MAX_PARTS * tile.shape.D) + tile.first() * MAX_PARTS;
    }

    // The sums of the first `warps` for a part; of the only part the result.
    template <typename T, typename C>
    __device__ void add_warps(const Tile<T, C, G>& tile, int warps, int part, int parts) {
        const int D = tile.shape.D;
        T* out = tile.x.out + tile.first() * D;
        __syncthreads();
        for (int i = threadIdx.x; i < tile.heads * D; i += THREADS) {
            const int head = i / D, d = i % D;
            float top = largest[0][head];
#pragma unroll
            for (int w = 1; w < WARPS; ++w)
                top = w < warps ? fmaxf(top, largest[w][head]) : top;
            float total = 0, total_weight = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                if (w < warps) {
                    const float keep = power_of_2(largest[w][head] - top);
                    total = fmaf(sums[w][head][d], keep, total);
                    total_weight = fmaf(weights[w][head], keep, total_weight);
                }
            }
            if (parts == 1) {
                out[i] = narrow<T>(total / total_weight);
                continue;
            }
            sums_of_parts(tile)[(head * MAX_PARTS + part) * D + d] = total;
            if (d == 0)
                scales_of_parts(tile)[head * MAX_PARTS + part] = make_float2(total_weight, top);
        }
        __syncthreads();
    }

    // By the CTA that comes last.
    template <typename T, typename C>
    __device__ void add_parts(const Tile<T, C, G>& tile, int parts) {
        const int D = tile.shape.D;
        __threadfence();
        __syncthreads();
        int* count = tile.x.arrived + tile.first();
        if (threadIdx.x == 0) {
            last = atomicAdd(count, 1) == min(int(gridDim.x), parts) - 1;
            if (last)
                *count = 0;
        }
        __syncthreads();
        if (!last)
            return;
        __threadfence();
        for (int head = threadIdx.x / 32; head < tile.heads; head += WARPS) {
            // A lane has a part: MAX_PARTS is 32.
            const float2 scales = lane_id() < parts ? __ldcg(scales_of_parts(tile) + head * MAX_PARTS + lane_id())
                                                    : make_float2(0, LOWEST);
            float top = scales.y;
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, step));
            const float keep = power_of_2(scales.y - top);
            factors[head][lane_id()] = keep / warp_sum(scales.x * keep);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < tile.heads * D; i += THREADS) {
            const int head = i / D;
            const float* from = sums_of_parts(tile) + int64_t(head) * MAX_PARTS * D + i % D;
            float total = 0;
#pragma unroll 8
            for (int part = 0; part < parts; ++part)
                total = fmaf(__ldcg(from + part * D), factors[head][part], total);
            tile.x.out[tile.first() * D + i] = narrow<T>(total);
        }
    }
};
