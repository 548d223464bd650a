// Bound by the bytes of the cache: flash decoding (Dao et al. 2023) over a paged cache. A row's context is cut into
// parts; a CTA takes a part of a tile of heads that share a key head, and the last CTA to arrive adds the parts in order.
#include "memory.cuh"
#include "reduce.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK = 16;
constexpr int MAX_PARTS = 32;
constexpr int MIN_PART = 64;
constexpr int PER_LANE = 8;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename T>
__device__ float rounded(float value) {
    return widen(narrow<T>(value));
}

// Element i of x [D] rotated, in x's dtype.
template <typename T>
__device__ T rotate(const T* x, const T* cos, const T* sin, int i, int D) {
    const int partner = i < D / 2 ? i + D / 2 : i - D / 2;
    const float a = __fmul_rn(widen(x[i]), widen(cos[i])), b = __fmul_rn(widen(x[partner]), widen(sin[i]));
    return narrow<T>(__fadd_rn(rounded<T>(a), rounded<T>(b)));
}

// Eight raw elements as they lie in memory.
template <typename T>
struct Raw {
    uint4 words[sizeof(T) / 2];
};

template <typename T>
__device__ Raw<T> load_raw(const T* p, int first, int D, bool vector) {
    Raw<T> raw;
    if (vector) {
#pragma unroll
        for (int i = 0; i < int(sizeof(T)) / 2; ++i)
            raw.words[i] = reinterpret_cast<const uint4*>(p + first)[i];
        return raw;
    }
    T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
        elements[i] = first + i < D ? p[first + i] : narrow<T>(0.0f);
    return raw;
}

__device__ inline void widen8(const Raw<float>& raw, float (&v)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        v[4 * i] = __uint_as_float(raw.words[i].x), v[4 * i + 1] = __uint_as_float(raw.words[i].y);
        v[4 * i + 2] = __uint_as_float(raw.words[i].z), v[4 * i + 3] = __uint_as_float(raw.words[i].w);
    }
}

template <typename T>
__device__ void widen8(const Raw<T>& raw, float (&v)[PER_LANE]) {
    const uint32_t words[4] = {raw.words[0].x, raw.words[0].y, raw.words[0].z, raw.words[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = widen(T{uint16_t(words[i])});
        v[2 * i + 1] = widen(T{uint16_t(words[i] >> 16)});
    }
}

// L lanes share a token, eight elements each; G: heads of a tile.
template <typename T, int L, int G>
__device__ void paged_attention(const T* q,          // [B, heads, D]
                                const T* k,          // [B, kv_heads, D]
                                const T* v,          // [B, kv_heads, D]
                                const T* cos,        // [B, D]
                                const T* sin,        // [B, D]
                                const int* tables,   // [B, table]
                                const int* lengths,  // [B]
                                T* keys,             // [blocks, BLOCK, kv_heads, D]
                                T* values,           // [blocks, BLOCK, kv_heads, D]
                                float* partials,     // [B, heads, MAX_PARTS, D + 2]
                                int* arrived,        // [B, heads], zeros
                                T* out,              // [B, heads, D]
                                int heads, int kv_heads, int D, int blocks, int table, int window, bool vector) {
    constexpr int MAX_D = L * PER_LANE;
    constexpr int STREAMS = WARPS * 32 / L; // groups of lanes, each with its own tokens
    constexpr int UNROLL = G == 8 ? 2 : 4;  // tokens in flight of a group
    __shared__ __align__(16) float query[G][MAX_D];
    __shared__ float sums[WARPS][G][MAX_D];
    __shared__ float largest[WARPS][G], weights[WARPS][G];
    __shared__ int last;

    let_next_kernel_start();
    wait_for_previous_kernel();
    const int row = blockIdx.z, group = heads / kv_heads, tiles = (group + G - 1) / G;
    const int kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles;
    const int first_head = kv_head * group + tile * G, tile_heads = min(G, group - tile * G);
    const int length = max(0, min(lengths[row], table * BLOCK));
    const int first = window > 0 ? max(0, length - window) : 0;
    // Cut by the row's own length, so that its result depends on nothing else.
    const int span = length - first, cut = (span + MAX_PARTS - 1) / MAX_PARTS;
    const int part_size = max(1, (cut + MIN_PART - 1) / MIN_PART) * MIN_PART;
    const int parts = (span + part_size - 1) / part_size;
    T* out_tile = out + (int64_t(row) * heads + first_head) * D;
    if (parts == 0) {
        for (int i = threadIdx.x; blockIdx.x == 0 && i < tile_heads * D; i += THREADS)
            out_tile[i] = narrow<T>(0.0f);
        return;
    }
    if (int(blockIdx.x) >= parts)
        return;

    q += (int64_t(row) * heads + first_head) * D, cos += int64_t(row) * D, sin += int64_t(row) * D;
    tables += int64_t(row) * table;
    const auto slot = [&](int t) {
        return int64_t(max(0, min(tables[t / BLOCK], blocks - 1))) * BLOCK + t % BLOCK;
    };
    const float scale = LOG2_E * rsqrtf(float(D)); // scores in powers of two
    for (int i = threadIdx.x; i < G * MAX_D; i += THREADS) {
        const int head = i / MAX_D, d = i % MAX_D;
        const bool real = head < tile_heads && d < D;
        query[head][d] = real ? widen(rotate(q + head * D, cos, sin, d, D)) * scale : 0.0f;
    }
    if ((parts - 1) % gridDim.x == blockIdx.x) {
        // This CTA reads the new token: it appends it first.
        const int64_t from = (int64_t(row) * kv_heads + kv_head) * D, to = (slot(length - 1) * kv_heads + kv_head) * D;
        for (int i = threadIdx.x; i < D; i += THREADS) {
            keys[to + i] = rotate(k + from, cos, sin, i, D);
            values[to + i] = v[from + i];
        }
    }
    __syncthreads();

    const int warp = threadIdx.x / 32, lane = lane_id() % L, stream = threadIdx.x / L;
    const int element = lane * PER_LANE;
    const bool has_elements = element < D;
    float* partial = partials + (int64_t(row) * heads + first_head) * MAX_PARTS * (D + 2);
    for (int part = blockIdx.x; part < parts; part += gridDim.x) {
        const int begin = first + part * part_size, end = min(begin + part_size, length);
        float sum[G][PER_LANE] = {}, weight[G] = {}, most[G];
#pragma unroll
        for (int g = 0; g < G; ++g)
            most[g] = -INFINITY;
        for (int t = begin + stream; t - stream < end; t += UNROLL * STREAMS) {
            Raw<T> key[UNROLL] = {}, value[UNROLL] = {};
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (t + u * STREAMS < end && has_elements) {
                    const int64_t at = (slot(t + u * STREAMS) * kv_heads + kv_head) * D;
                    key[u] = load_raw(keys + at, element, D, vector);
                    value[u] = load_raw(values + at, element, D, vector);
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float wide[PER_LANE], score[G];
                widen8(key[u], wide);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float4 a = *reinterpret_cast<const float4*>(&query[g][element]);
                    const float4 b = *reinterpret_cast<const float4*>(&query[g][element + 4]);
                    float dot = wide[0] * a.x;
                    dot = fmaf(wide[1], a.y, dot), dot = fmaf(wide[2], a.z, dot), dot = fmaf(wide[3], a.w, dot);
                    dot = fmaf(wide[4], b.x, dot), dot = fmaf(wide[5], b.y, dot), dot = fmaf(wide[6], b.z, dot);
                    score[g] = fmaf(wide[7], b.w, dot);
                }
#pragma unroll
                for (int step = L / 2; step > 0; step /= 2)
#pragma unroll
                    for (int g = 0; g < G; ++g)
                        score[g] += __shfl_xor_sync(FULL_WARP, score[g], step);
                if (t + u * STREAMS >= end)
                    continue;
                widen8(value[u], wide);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float before = most[g];
                    most[g] = fmaxf(before, score[g]);
                    const float keep = exp2f(before - most[g]), p = exp2f(score[g] - most[g]);
                    weight[g] = fmaf(weight[g], keep, p);
#pragma unroll
                    for (int i = 0; i < PER_LANE; ++i)
                        sum[g][i] = fmaf(p, wide[i], sum[g][i] * keep);
                }
            }
        }
        // The streams of a warp, then the warps, each in a fixed order.
#pragma unroll
        for (int g = 0; g < G; ++g) {
#pragma unroll
            for (int step = L; step < 32; step *= 2) {
                const float other = __shfl_xor_sync(FULL_WARP, most[g], step), top = fmaxf(most[g], other);
                const float keep = top == -INFINITY ? 0.0f : exp2f(most[g] - top);
                most[g] = top;
                weight[g] *= keep;
                weight[g] += __shfl_xor_sync(FULL_WARP, weight[g], step);
#pragma unroll
                for (int i = 0; i < PER_LANE; ++i) {
                    sum[g][i] *= keep;
                    sum[g][i] += __shfl_xor_sync(FULL_WARP, sum[g][i], step);
                }
            }
            if (lane_id() < L) {
#pragma unroll
                for (int i = 0; i < PER_LANE; ++i)
                    sums[warp][g][element + i] = sum[g][i];
                if (lane == 0)
                    largest[warp][g] = most[g], weights[warp][g] = weight[g];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < tile_heads * D; i += THREADS) {
            const int head = i / D, d = i % D;
            float top = largest[0][head];
#pragma unroll
            for (int w = 1; w < WARPS; ++w)
                top = fmaxf(top, largest[w][head]);
            float total = 0, total_weight = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float keep = exp2f(largest[w][head] - top);
                total = fmaf(sums[w][head][d], keep, total);
                total_weight = fmaf(weights[w][head], keep, total_weight);
            }
            if (parts == 1) {
                out_tile[i] = narrow<T>(total / total_weight);
                continue;
            }
            float* to = partial + (head * MAX_PARTS + part) * (D + 2);
            to[d] = total;
            if (d == 0)
                to[D] = total_weight, to[D + 1] = top;
        }
        __syncthreads();
    }
    if (parts == 1)
        return;

    const int ctas = min(int(gridDim.x), parts);
    __threadfence();
    __syncthreads();
    int* count = arrived + int64_t(row) * heads + first_head;
    if (threadIdx.x == 0) {
        last = atomicAdd(count, 1) == ctas - 1;
        if (last)
            *count = 0;
    }
    __syncthreads();
    if (!last)
        return;
    __threadfence();
    for (int i = threadIdx.x; i < tile_heads * D; i += THREADS) {
        const float* from = partial + i / D * MAX_PARTS * (D + 2);
        const int d = i % D;
        float top = -INFINITY, total = 0, total_weight = 0;
        for (int part = 0; part < parts; ++part)
            top = fmaxf(top, __ldcg(from + part * (D + 2) + D + 1));
        for (int part = 0; part < parts; ++part) {
            const float* of_part = from + part * (D + 2);
            const float keep = exp2f(__ldcg(of_part + D + 1) - top);
            total = fmaf(__ldcg(of_part + d), keep, total);
            total_weight = fmaf(__ldcg(of_part + D), keep, total_weight);
        }
        out_tile[i] = narrow<T>(total / total_weight);
    }
}

#define PAGED_ATTENTION(L, G, T, dtype)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) paged_attention_##L##_##G##_##dtype(                         \
        const T* q, const T* k, const T* v, const T* cos, const T* sin, const int* tables, const int* lengths,         \
        T* keys, T* values, float* partials, int* arrived, T* out, int heads, int kv_heads, int D, int blocks,         \
        int table, int window, bool vector) {                                                                          \
        paged_attention<T, L, G>(q, k, v, cos, sin, tables, lengths, keys, values, partials, arrived, out, heads,      \
                                 kv_heads, D, blocks, table, window, vector);                                          \
    }

#define PAGED_ATTENTION_DTYPES(L, G)                                                                                   \
    PAGED_ATTENTION(L, G, float, f32)                                                                                  \
    PAGED_ATTENTION(L, G, f16, f16)                                                                                    \
    PAGED_ATTENTION(L, G, bf16, bf16)

PAGED_ATTENTION_DTYPES(8, 1)
PAGED_ATTENTION_DTYPES(8, 4)
PAGED_ATTENTION_DTYPES(8, 8)
PAGED_ATTENTION_DTYPES(16, 1)
PAGED_ATTENTION_DTYPES(16, 4)
PAGED_ATTENTION_DTYPES(16, 8)
PAGED_ATTENTION_DTYPES(32, 1)
PAGED_ATTENTION_DTYPES(32, 4)
PAGED_ATTENTION_DTYPES(32, 8)
