// Bound by the bytes of the cache: flash decoding (Dao et al. 2023) over a paged cache. A row's context is cut into
// parts; a CTA takes a part of a tile of heads that share a key head, and the last CTA to arrive adds the parts in
// order.
#include "paged_attention.cuh"

constexpr int PER_LANE = 8;

// Eight elements as they lie in memory.
template <typename T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Raw {
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
            reinterpret_cast<T*>(raw.words)[i] = element + i < D ? p[element + i] : T{};
        return raw;
    }
}

__device__ inline void widen8(const Raw<float>& raw, float (&v)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
        v[i] = __uint_as_float(raw.words[i]);
}

// Codes without their scale.
__device__ inline void widen8(const Raw<uint8_t>& raw, float (&v)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
        v[i] = float(int(raw.words[i / 4] >> i % 4 * 8 & 0xff) - 128);
}

template <typename T>
__device__ void widen8(const Raw<T>& raw, float (&v)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) {
        v[2 * i] = widen(T{uint16_t(raw.words[i])});
        v[2 * i + 1] = widen(T{uint16_t(raw.words[i] >> 16)});
    }
}

// L lanes share a token, eight elements each; G: heads of a tile; VECTOR: rows lie on 16-byte boundaries.
template <typename T, typename C, int L, int G, bool VECTOR>
__device__ void paged_attention(const Tensors<T, C>& x, const Shape& shape) {
    constexpr int MAX_D = L * PER_LANE;
    constexpr int STREAMS = THREADS / L;  // groups of lanes, each with its own tokens
    constexpr int UNROLL = 4 / sizeof(T); // tokens that a group computes while it loads as many
    constexpr int STRIDE = UNROLL * STREAMS;
    __shared__ __align__(16) float query[G][MAX_D];
    __shared__ Meeting<G, MAX_D> meeting;

    const int D = shape.D;
    const Tile<T, C, G> tile(x, shape);
    let_next_kernel_start();
    const Cut cut = tile.wait();
    if (cut.parts == 0 && blockIdx.x == 0)
        tile.store_zeros();
    if (int(blockIdx.x) >= cut.parts)
        return;

    const float scale = LOG2_E * rsqrtf(float(D)); // scores in powers of two
    for (int i = threadIdx.x; i < G * MAX_D; i += THREADS) {
        const int head = i / MAX_D, d = i % MAX_D;
        query[head][d] = head < tile.heads && d < D ? widen(tile.query(head, d)) * scale : 0.0f;
    }
    if ((cut.parts - 1) % gridDim.x == blockIdx.x) {
        // This CTA reads the new token.
        const int slot = tile.slot(cut.length - 1);
        const int64_t to = tile.element(slot), scale_to = tile.scale(slot);
        tile.template make_new<MAX_D>(x.keys + to, x.values + to, x.key_scales + scale_to, x.value_scales + scale_to);
    }
    __syncthreads();

    const int warp = threadIdx.x / 32, lane = lane_id() % L, stream = threadIdx.x / L;
    // Lanes past the head's end repeat its last elements; their part of the query is zero.
    const int element = lane * PER_LANE, loaded = VECTOR ? min(element, D - PER_LANE) : element;
    for (int part = blockIdx.x; part < cut.parts; part += gridDim.x) {
        const int begin = cut.begin(part), end = cut.end(part);
        tile.prefetch(cut, part + gridDim.x);
        float sum[G][PER_LANE] = {}, weight[G] = {}, most[G];
#pragma unroll
        for (int g = 0; g < G; ++g)
            most[g] = LOWEST;
        Raw<C> next_key[UNROLL], next_value[UNROLL];
        float next_key_scale[UNROLL], next_value_scale[UNROLL];
        const auto load = [&](int t) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int token = min(t + u * STREAMS, end - 1);
                const int slot = tile.slot(token);
                const int64_t at = tile.element(slot);
                next_key[u] = load_raw<VECTOR>(x.keys + at, loaded, D);
                next_value[u] = load_raw<VECTOR>(x.values + at, loaded, D);
                if constexpr (sizeof(C) == 1)
                    next_key_scale[u] = x.key_scales[tile.scale(slot)],
                    next_value_scale[u] = x.value_scales[tile.scale(slot)];
            }
        };
        load(begin + stream);
        for (int t = begin + stream; t - stream < end; t += STRIDE) {
            Raw<C> key[UNROLL], value[UNROLL];
            float key_scale[UNROLL], value_scale[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u)
                key[u] = next_key[u], value[u] = next_value[u], key_scale[u] = next_key_scale[u],
                value_scale[u] = next_value_scale[u];
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
                    if constexpr (sizeof(C) == 1)
                        score[u][g] *= key_scale[u];
                    score[u][g] = t + u * STREAMS < end ? score[u][g] : -INFINITY;
                    top = fmaxf(top, score[u][g]);
                }
                const float keep = power_of_2(most[g] - top);
                most[g] = top, weight[g] *= keep;
#pragma unroll
                for (int i = 0; i < PER_LANE; ++i)
                    sum[g][i] *= keep;
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float wide[PER_LANE];
                widen8(value[u], wide);
                if constexpr (sizeof(C) == 1)
#pragma unroll
                    for (int i = 0; i < PER_LANE; ++i)
                        wide[i] *= value_scale[u];
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float p = power_of_2(score[u][g] - most[g]);
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
                const float keep = power_of_2(most[g] - top);
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
                    meeting.sums[warp][g][element + i] = sum[g][i];
                if (lane == 0)
                    meeting.largest[warp][g] = most[g], meeting.weights[warp][g] = weight[g];
            }
        }
        meeting.add_warps(tile, WARPS, part, cut.parts);
    }
    if (cut.parts > 1)
        meeting.add_parts(tile, cut.parts);
}

#define PAGED_ATTENTION(name, L, G, VECTOR, T, C, dtype)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, VECTOR&& G == 1 ? 3 : 1)                                     \
        paged_attention_##name##_##dtype(Tensors<T, C> x, Shape shape) {                                               \
        paged_attention<T, C, L, G, VECTOR>(x, shape);                                                                 \
    }

#define PAGED_ATTENTION_DTYPES(name, L, G, VECTOR)                                                                     \
    PAGED_ATTENTION(name, L, G, VECTOR, float, float, f32)                                                             \
    PAGED_ATTENTION(name, L, G, VECTOR, f16, f16, f16)                                                                 \
    PAGED_ATTENTION(name, L, G, VECTOR, bf16, bf16, bf16)

PAGED_ATTENTION_DTYPES(8_1, 8, 1, true)
PAGED_ATTENTION_DTYPES(8_4, 8, 4, true)
PAGED_ATTENTION_DTYPES(8_8, 8, 8, true)
PAGED_ATTENTION_DTYPES(16_1, 16, 1, true)
PAGED_ATTENTION_DTYPES(16_4, 16, 4, true)
PAGED_ATTENTION_DTYPES(16_8, 16, 8, true)
PAGED_ATTENTION_DTYPES(32_1, 32, 1, true)
PAGED_ATTENTION_DTYPES(32_4, 32, 4, true)
PAGED_ATTENTION_DTYPES(any, 32, 1, false)
PAGED_ATTENTION(codes, 32, 1, false, float, uint8_t, f32)
PAGED_ATTENTION(codes, 32, 1, false, f16, uint8_t, f16)
PAGED_ATTENTION(codes, 32, 1, false, bf16, uint8_t, bf16)
