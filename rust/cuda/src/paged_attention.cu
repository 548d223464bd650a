// Bound by the bytes of the cache: flash decoding (Dao et al. 2023) over a paged cache. A row's context is cut into
// parts; a CTA takes a part of a tile of heads that share a key head, and the last CTA to arrive adds the parts in
// order.
#include "memory.cuh"
#include "overlap.cuh"
#include "reduce.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK = 16;
constexpr int MAX_PARTS = 32;
constexpr int MIN_PART = 256;
constexpr int PER_LANE = 8;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.4028235e38f; // below every score, and its difference from one is a number

// Element i of x [D] rotated, in x's dtype.
template <typename T>
__device__ T rotate(const T* x, const T* cos, const T* sin, int i, int D) {
    const int partner = i < D / 2 ? i + D / 2 : i - D / 2;
    const float a = __fmul_rn(widen(x[i]), widen(cos[i])), b = __fmul_rn(widen(x[partner]), widen(sin[i]));
    return narrow<T>(__fadd_rn(rounded<T>(a), rounded<T>(b)));
}

// Eight elements as they lie in memory.
template <typename T>
struct alignas(16) Raw {
    uint32_t words[PER_LANE * sizeof(T) / 4];
};

template <bool VECTOR, typename T>
__device__ Raw<T> load_raw(const T* p, int element, int D) {
    if constexpr (VECTOR) {
        return *reinterpret_cast<const Raw<T>*>(p + element);
    } else {
        Raw<T> raw;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            reinterpret_cast<T*>(raw.words)[i] = element + i < D ? p[element + i] : narrow<T>(0.0f);
        return raw;
    }
}

__device__ inline void widen8(const Raw<float>& raw, float (&v)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
        v[i] = __uint_as_float(raw.words[i]);
}

template <typename T>
__device__ void widen8(const Raw<T>& raw, float (&v)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) {
        v[2 * i] = widen(T{uint16_t(raw.words[i])});
        v[2 * i + 1] = widen(T{uint16_t(raw.words[i] >> 16)});
    }
}

// A row's context, cut by its own length, so that its result depends on nothing else.
struct Cut {
    int first, length, part_size, parts;

    __device__ Cut(int length_, int most, int window) : length(max(0, min(length_, most))) {
        first = window > 0 ? max(0, length - window) : 0;
        const int span = length - first, cut = (span + MAX_PARTS - 1) / MAX_PARTS;
        part_size = max(1, (cut + MIN_PART - 1) / MIN_PART) * MIN_PART;
        parts = (span + part_size - 1) / part_size;
    }
    __device__ int begin(int part) const { return first + part * part_size; }
    __device__ int end(int part) const { return min(begin(part) + part_size, length); }
};

struct Shape {
    int heads, kv_heads, D, blocks, table, window;
};

// L lanes share a token, eight elements each; G: heads of a tile; VECTOR: rows lie on 16-byte boundaries.
template <typename T, int L, int G, bool VECTOR>
__device__ void paged_attention(const T* q,         // [B, heads, D]
                                const T* k,         // [B, kv_heads, D]
                                const T* v,         // [B, kv_heads, D]
                                const T* cos,       // [B, D]
                                const T* sin,       // [B, D]
                                const int* tables,  // [B, table]
                                const int* lengths, // [B]
                                T* keys,            // [blocks, BLOCK, kv_heads, D]
                                T* values,          // [blocks, BLOCK, kv_heads, D]
                                float* partials,    // [B, heads, MAX_PARTS, D], then their weights and largest scores
                                int* arrived,       // [B, heads], zeros
                                T* out,             // [B, heads, D]
                                const Shape& shape) {
    constexpr int MAX_D = L * PER_LANE;
    constexpr int STREAMS = THREADS / L;  // groups of lanes, each with its own tokens
    constexpr int UNROLL = 4 / sizeof(T); // tokens that a group computes while it loads as many
    constexpr int STRIDE = UNROLL * STREAMS;
    __shared__ __align__(16) float query[G][MAX_D];
    __shared__ float sums[WARPS][G][MAX_D];
    __shared__ float largest[WARPS][G], weights[WARPS][G], factors[G][MAX_PARTS];
    __shared__ bool last;

    const int heads = shape.heads, kv_heads = shape.kv_heads, D = shape.D, table = shape.table;
    const int row = blockIdx.z, group = heads / kv_heads, tiles = (group + G - 1) / G;
    const int kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles;
    const int first_head = kv_head * group + tile * G, tile_heads = min(G, group - tile * G);
    tables += int64_t(row) * table;
    keys += kv_head * D, values += kv_head * D;
    const int token_stride = kv_heads * D;
    const auto offset = [&](int block, int t) {
        return (int64_t(max(0, min(block, shape.blocks - 1))) * BLOCK + t % BLOCK) * token_stride;
    };

    // Length and table are nearly always known before the kernel before this one has ended; what they name is moved
    // to L2 meanwhile. They are read again after the wait, and not through L1, which may then be out of date.
    let_next_kernel_start();
    const Cut guess(__ldcg(lengths + row), table * BLOCK, shape.window);
    if (int(blockIdx.x) < guess.parts) {
        for (int t = guess.begin(blockIdx.x) + threadIdx.x; t < guess.end(blockIdx.x); t += THREADS) {
            const int64_t at = offset(__ldcg(tables + t / BLOCK), t);
            for (int i = 0; i < D; i += 128 / sizeof(T))
                prefetch_l2(keys + at + i), prefetch_l2(values + at + i);
        }
    }
    wait_for_previous_kernel();

    const Cut cut(__ldcg(lengths + row), table * BLOCK, shape.window);
    T* out_tile = out + (int64_t(row) * heads + first_head) * D;
    if (cut.parts == 0) {
        for (int i = threadIdx.x; blockIdx.x == 0 && i < tile_heads * D; i += THREADS)
            out_tile[i] = narrow<T>(0.0f);
        return;
    }
    if (int(blockIdx.x) >= cut.parts)
        return;

    q += (int64_t(row) * heads + first_head) * D, cos += int64_t(row) * D, sin += int64_t(row) * D;
    const float scale = LOG2_E * rsqrtf(float(D)); // scores in powers of two
    for (int i = threadIdx.x; i < G * MAX_D; i += THREADS) {
        const int head = i / MAX_D, d = i % MAX_D;
        const bool real = head < tile_heads && d < D;
        query[head][d] = real ? widen(rotate(q + head * D, cos, sin, d, D)) * scale : 0.0f;
    }
    if ((cut.parts - 1) % gridDim.x == blockIdx.x) {
        // This CTA reads the new token: it appends it first.
        const int64_t from = (int64_t(row) * kv_heads + kv_head) * D;
        const int64_t to = offset(tables[(cut.length - 1) / BLOCK], cut.length - 1);
        for (int i = threadIdx.x; i < D; i += THREADS) {
            keys[to + i] = rotate(k + from, cos, sin, i, D);
            values[to + i] = v[from + i];
        }
    }
    __syncthreads();

    const int warp = threadIdx.x / 32, lane = lane_id() % L, stream = threadIdx.x / L;
    // Lanes past the head's end repeat its last elements; their part of the query is zero.
    const int element = lane * PER_LANE, loaded = VECTOR ? min(element, D - PER_LANE) : element;
    const int64_t first_partial = (int64_t(row) * heads + first_head) * MAX_PARTS;
    float* sums_of_parts = partials + first_partial * D;
    float2* scales_of_parts =
        reinterpret_cast<float2*>(partials + int64_t(gridDim.z) * heads * MAX_PARTS * D) + first_partial;
    for (int part = blockIdx.x; part < cut.parts; part += gridDim.x) {
        const int begin = cut.begin(part), end = cut.end(part);
        float sum[G][PER_LANE] = {}, weight[G] = {}, most[G];
#pragma unroll
        for (int g = 0; g < G; ++g)
            most[g] = LOWEST;
        Raw<T> next_key[UNROLL], next_value[UNROLL];
        const auto load = [&](int t) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int token = min(t + u * STREAMS, end - 1);
                const int64_t at = offset(tables[token / BLOCK], token);
                next_key[u] = load_raw<VECTOR>(keys + at, loaded, D);
                next_value[u] = load_raw<VECTOR>(values + at, loaded, D);
            }
        };
        load(begin + stream);
        for (int t = begin + stream; t - stream < end; t += STRIDE) {
            Raw<T> key[UNROLL], value[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u)
                key[u] = next_key[u], value[u] = next_value[u];
            if (t - stream + STRIDE < end)
                load(t + STRIDE);
            float score[UNROLL][G];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float wide[PER_LANE];
                widen8(key[u], wide);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float4 a = *reinterpret_cast<const float4*>(&query[g][element]);
                    const float4 b = *reinterpret_cast<const float4*>(&query[g][element + 4]);
                    float dot = wide[0] * a.x;
                    dot = fmaf(wide[1], a.y, dot), dot = fmaf(wide[2], a.z, dot), dot = fmaf(wide[3], a.w, dot);
                    dot = fmaf(wide[4], b.x, dot), dot = fmaf(wide[5], b.y, dot), dot = fmaf(wide[6], b.z, dot);
                    score[u][g] = fmaf(wide[7], b.w, dot);
                }
            }
#pragma unroll
            for (int step = L / 2; step > 0; step /= 2)
#pragma unroll
                for (int u = 0; u < UNROLL; ++u)
#pragma unroll
                    for (int g = 0; g < G; ++g)
                        score[u][g] += __shfl_xor_sync(FULL_WARP, score[u][g], step);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float top = most[g];
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    score[u][g] = t + u * STREAMS < end ? score[u][g] : -INFINITY;
                    top = fmaxf(top, score[u][g]);
                }
                const float keep = exp2f(most[g] - top);
                most[g] = top, weight[g] *= keep;
#pragma unroll
                for (int i = 0; i < PER_LANE; ++i)
                    sum[g][i] *= keep;
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float wide[PER_LANE];
                widen8(value[u], wide);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float p = exp2f(score[u][g] - most[g]);
                    weight[g] += p;
#pragma unroll
                    for (int i = 0; i < PER_LANE; ++i)
                        sum[g][i] = fmaf(p, wide[i], sum[g][i]);
                }
            }
        }
        // The streams of a warp, then the warps, each in a fixed order.
#pragma unroll
        for (int g = 0; g < G; ++g) {
#pragma unroll
            for (int step = L; step < 32; step *= 2) {
                const float top = fmaxf(most[g], __shfl_xor_sync(FULL_WARP, most[g], step));
                const float keep = exp2f(most[g] - top);
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
            if (cut.parts == 1) {
                out_tile[i] = narrow<T>(total / total_weight);
                continue;
            }
            sums_of_parts[(head * MAX_PARTS + part) * D + d] = total;
            if (d == 0)
                scales_of_parts[head * MAX_PARTS + part] = make_float2(total_weight, top);
        }
        __syncthreads();
    }
    if (cut.parts == 1)
        return;

    __threadfence();
    __syncthreads();
    int* count = arrived + int64_t(row) * heads + first_head;
    if (threadIdx.x == 0) {
        last = atomicAdd(count, 1) == min(int(gridDim.x), cut.parts) - 1;
        if (last)
            *count = 0;
    }
    __syncthreads();
    if (!last)
        return;
    __threadfence();
    for (int head = warp; head < tile_heads; head += WARPS) {
        // A lane has a part: MAX_PARTS is 32.
        const bool real = lane_id() < cut.parts;
        const float2 scales = real ? __ldcg(scales_of_parts + head * MAX_PARTS + lane_id()) : make_float2(0, LOWEST);
        float top = scales.y;
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, step));
        const float keep = exp2f(scales.y - top);
        factors[head][lane_id()] = keep / warp_sum(scales.x * keep);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile_heads * D; i += THREADS) {
        const int head = i / D;
        const float* from = sums_of_parts + int64_t(head) * MAX_PARTS * D + i % D;
        float total = 0;
#pragma unroll 8
        for (int part = 0; part < cut.parts; ++part)
            total = fmaf(__ldcg(from + part * D), factors[head][part], total);
        out_tile[i] = narrow<T>(total);
    }
}

#define PAGED_ATTENTION(name, L, G, VECTOR, T, dtype)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, VECTOR&& G == 1 ? 3 : 1) paged_attention_##name##_##dtype(   \
        const T* q, const T* k, const T* v, const T* cos, const T* sin, const int* tables, const int* lengths,         \
        T* keys, T* values, float* partials, int* arrived, T* out, Shape shape) {                                      \
        paged_attention<T, L, G, VECTOR>(q, k, v, cos, sin, tables, lengths, keys, values, partials, arrived, out,     \
                                         shape);                                                                       \
    }

#define PAGED_ATTENTION_DTYPES(name, L, G, VECTOR)                                                                     \
    PAGED_ATTENTION(name, L, G, VECTOR, float, f32)                                                                    \
    PAGED_ATTENTION(name, L, G, VECTOR, f16, f16)                                                                      \
    PAGED_ATTENTION(name, L, G, VECTOR, bf16, bf16)

PAGED_ATTENTION_DTYPES(8_1, 8, 1, true)
PAGED_ATTENTION_DTYPES(8_4, 8, 4, true)
PAGED_ATTENTION_DTYPES(8_8, 8, 8, true)
PAGED_ATTENTION_DTYPES(16_1, 16, 1, true)
PAGED_ATTENTION_DTYPES(16_4, 16, 4, true)
PAGED_ATTENTION_DTYPES(16_8, 16, 8, true)
PAGED_ATTENTION_DTYPES(32_1, 32, 1, true)
PAGED_ATTENTION_DTYPES(32_4, 32, 4, true)
PAGED_ATTENTION_DTYPES(any, 32, 1, false)
