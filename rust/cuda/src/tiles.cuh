// What tiles of few and of many rows of x have in common.
#pragma once
#include "absmax.cuh"
#include "cluster.cuh"
#include "codes.cuh"
#include "low_rank.cuh"
#include "memory.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "pipeline.cuh"
#include "sigmoid.cuh"
#include "wgmma.cuh"

constexpr int MAX_PARTS = 4;

// The weights [N, K] of both halves of a tile, which are one weight or a gate and an up projection, what stands beside
// them, and where the product goes; laid out as the launcher's `Part`.
struct Part {
    Map maps[2];
    Absmax absmax[2];
    const void* bias[2]; // [N] or null
    Share shares[2];
    void* out;
    int N, first_tile;
};
static_assert(sizeof(Part) == 384, "as the launcher's");

struct Parts {
    Part at[MAX_PARTS];
    Hidden hidden;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int LINE = 256; // weights of a row of one stage: 128 bytes
constexpr int BLOCKS = LINE / 64;
constexpr int MAX_SPLITS = 5;

// `sum` (+)= a b of 64 rows of W, N rows of x and 16 elements of K; b: a descriptor of shared memory.
template <typename T, int N>
struct Wgmma;

#define WGMMA(T, dtype, N, SUMS, A, B, ADDS, ...)                                                                      \
    template <>                                                                                                        \
    struct Wgmma<T, N> {                                                                                               \
        static __device__ void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool adds) {                 \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N         \
                         "k16.f32." #dtype "." #dtype " {" SUMS "}, {" A "}, " B ", p, 1, 1, 0;\n}"                    \
                         : __VA_ARGS__                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)));                        \
        }                                                                                                              \
    };

#define WGMMAS(T, dtype)                                                                                               \
    WGMMA(T, dtype, 32, S1, "%16,%17,%18,%19", "%20", "%21", D8(0), D8(8))                                             \
    WGMMA(T, dtype, 64, S2, "%32,%33,%34,%35", "%36", "%37", D8(0), D8(8), D8(16), D8(24))                             \
    WGMMA(T, dtype, 128, S3, "%64,%65,%66,%67", "%68", "%69", D64)                                                     \
    WGMMA(T, dtype, 256, S4, "%128,%129,%130,%131", "%132", "%133", D128)

WGMMAS(bf16, bf16)
WGMMAS(f16, f16)

__device__ inline const Part& part_of(const Parts& parts, int tile) {
    int i = 0;
    while (i + 1 < MAX_PARTS && tile >= parts.at[i + 1].first_tile)
        ++i;
    return parts.at[i];
}

// Of the tile's rows a lane has this one and that eight below.
__device__ inline int lane_row() { return threadIdx.x / 32 * 16 + lane_id() / 4; }

// Codes of a block of both. Of each word a lane looks up one byte, so that the four lanes of a row together feed the
// contraction in the order in which x lies.
struct Block {
    uint4 upper[2], lower[2];

    // Chunks of 16 bytes are swizzled by the row's place among eight.
    template <int ROWS>
    __device__ Block(const uint8_t (&codes)[ROWS][LINE / 2], int block) {
        const uint8_t (*const rows)[LINE / 2] = &codes[lane_row()];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int chunk = ((2 * block + half) ^ lane_row() % 8) * 16;
            upper[half] = *reinterpret_cast<const uint4*>(rows[0] + chunk);
            lower[half] = *reinterpret_cast<const uint4*>(rows[8] + chunk);
        }
    }

    // Operand A of the four steps of a block; each contracts two words, of which `of_upper` and `of_lower` make pairs
    // of weights.
    template <typename Upper, typename Lower>
    __device__ void look_up(const Upper& of_upper, const Lower& of_lower, uint32_t (&a)[4][4]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t u[4] = {upper[half].x, upper[half].y, upper[half].z, upper[half].w};
            const uint32_t l[4] = {lower[half].x, lower[half].y, lower[half].z, lower[half].w};
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                uint32_t (&step)[4] = a[half * 2 + word / 2];
                step[word % 2 * 2] = of_upper(u[word]);
                step[word % 2 * 2 + 1] = of_lower(l[word]);
            }
        }
    }
};

// By all lanes of a warp.
__device__ inline void release(Barrier& barrier) {
    __syncwarp();
    if (lane_id() == 0)
        barrier.arrive();
}

// Sums of rows `row` and row + 8 of W take the place of the stages, which all who multiply have read.
template <int TOKENS, int ROWS>
__device__ void publish(float (&sums)[TOKENS][ROWS + 4], const float (&total)[TOKENS / 2], int row) {
    asm volatile("bar.sync 1, %0;" ::"n"(2 * ROWS) : "memory");
#pragma unroll
    for (int k = 0; k < TOKENS / 2; k += 4) {
        const int m = k * 2 + lane_id() % 4 * 2;
        sums[m][row] = total[k], sums[m + 1][row] = total[k + 1];
        sums[m][row + 8] = total[k + 2], sums[m + 1][row + 8] = total[k + 3];
    }
}

// Sums of four rows of W, those of all splits in order, times `factor`.
template <int TOKENS, int ROWS>
__device__ void sum_of_cluster(const float (&sums)[TOKENS][ROWS + 4], int m, int r, int splits, float factor,
                               float (&sum)[4]) {
    float4 v[MAX_SPLITS];
#pragma unroll
    for (int split = 0; split < MAX_SPLITS; ++split)
        v[split] = split < splits ? load_in_cluster(address_in(&sums[m][r], split)) : make_float4(0, 0, 0, 0);
    float4 all = v[0];
#pragma unroll
    for (int split = 1; split < MAX_SPLITS; ++split)
        all.x += v[split].x, all.y += v[split].y, all.z += v[split].z, all.w += v[split].w;
    sum[0] = all.x * factor, sum[1] = all.y * factor, sum[2] = all.z * factor, sum[3] = all.w * factor;
}

// What stands beside four rows of a weight from `n` on; shares: of the adapter.
template <typename T>
__device__ void add_beside(const Part& part, int half, int n, const float* shares, float (&v)[4]) {
    if (const T* bias = static_cast<const T*>(part.bias[half])) {
        float of_rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            of_rows[i] = n + i < part.N ? widen(bias[n + i]) : 0.0f;
        add_rounded<T>(v, of_rows);
    }
    if (part.shares[half].rank > 0) {
        const float4 share = *reinterpret_cast<const float4*>(shares);
        add_rounded<T>(v, {share.x, share.y, share.z, share.w});
    }
}

// Rows of x that a CTA of the cluster finishes: eights, which the last ones may not get.
template <int TOKENS>
__device__ int share_of(int splits) {
    return (TOKENS / 8 + splits - 1) / splits * 8;
}

// By those who multiply: each CTA of the cluster finishes a share of the rows of x, from `token` on. shares: of
// adapters, as sums; null where there are none.
template <typename T, int TOKENS, int ROWS>
__device__ void finish(const float (&sums)[TOKENS][ROWS + 4], const float (*shares)[ROWS + 4], const Part& part,
                       int row, int token, int M, int splits, bool gated, float factor) {
    const int share = share_of<TOKENS>(splits), rank = blockIdx.x % splits;
    T* const out = static_cast<T*>(part.out) + int64_t(token) * part.N + row;
    const int rows = min(part.N - row, gated ? ROWS / 2 : ROWS),
              tokens = min(min(M - token, TOKENS), (rank + 1) * share);
    const bool vector = part.N % 4 == 0 && reinterpret_cast<uintptr_t>(part.out) % 8 == 0;
    for (int e = threadIdx.x; e < share * (ROWS / 4); e += 2 * ROWS) {
        const int m = rank * share + e / (ROWS / 4), r = e % (ROWS / 4) * 4;
        if (m >= tokens || r >= rows)
            continue;
        float v[4];
        sum_of_cluster<TOKENS, ROWS>(sums, m, r, splits, factor, v);
        add_beside<T>(part, 0, row + r, &shares[m][r], v);
        if (gated) {
            float up[4];
            sum_of_cluster<TOKENS, ROWS>(sums, m, r + ROWS / 2, splits, factor, up);
            add_beside<T>(part, 1, row + r, &shares[m][r + ROWS / 2], up);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                v[i] = silu<T>(rounded<T>(v[i])) * rounded<T>(up[i]);
        }
        T* to = out + int64_t(m) * part.N + r;
        if (vector) {
            *reinterpret_cast<uint2*>(to) = make_uint2(narrow2<T>(v[0], v[1]), narrow2<T>(v[2], v[3]));
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (r + i < rows)
                to[i] = narrow<T>(v[i]);
    }
}

template <typename Entry>
__device__ void fill_tables(uint4* table, int threads, const Parts& parts, const Codebook& codebook, float gain) {
    const float entry = codebook.values[lane_id() % 16] * gain;
    fill_table(table, 0, threads, [&](int b) { return narrow2<Entry>(lookup16(entry, b >> 4), lookup16(entry, b)); });
    fill_table(table, 1, threads, [&](int b) { return __float_as_uint(__ldg(parts.at[0].absmax[0].map + b)); });
}

#endif
