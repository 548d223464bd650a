// x Wᵀ of tens to hundreds of rows x on Hopper's warpgroup instructions, from the checkpoint's bytes.
//
// W is operand A of wgmma, out of registers: bytes become pairs of values in a table. x is operand B, out of shared
// memory, where the copy engine puts it. The CTAs of a cluster share a tile of out and split K; each adds up a part of
// their sums, in order.
//
// In a tile of few rows of x, scales enter the fp32 sums of a block, so that the only rounding of a weight is that of
// sixteen constants. The halves of such a tile may be rows of a gate and an up projection; then out is their SwiGLU.
// Biases and adapters' shares join the finished sums, each rounded as the operation of that name rounds it. The sums of
// many rows fill the registers: there scales enter the weights, whose values in fp16 are rounded once more to the bf16
// of x. x of fp16 would show the first rounding, so for it there are no such tiles.
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

// TOKENS rows of x, few, by 64 * GROUPS rows of W.
template <typename T, int TOKENS, int GROUPS>
struct Few {
    static constexpr int ROWS = 64 * GROUPS, MULTIPLIERS = 128 * GROUPS, THREADS = MULTIPLIERS + 128;
    static constexpr int STAGES = GROUPS == 4 ? 2 : 3;
    static constexpr int X_STAGES = TOKENS > 64 ? 6 : GROUPS == 2 ? 12 : 8; // of 64 elements of K
    // A warp more could run a whole turn of the ring ahead, where parities repeat.
    static constexpr int SCALERS = STAGES;
    static constexpr int STRIP = GROUPS == 3 ? 96 : 128; // rows whose scales a warp decodes at once
    // Values of a second block are looked up while one is multiplied, where registers allow.
    static constexpr int BUFFERS = TOKENS * GROUPS >= 256 && GROUPS == 4 ? 1 : 2;
    // Of the registers that THREADS get at launch, those who multiply take most.
    static constexpr int MANY_REGISTERS = GROUPS == 2 ? 216 : GROUPS == 3 ? 152 : 112;
    static constexpr int FEW_REGISTERS = GROUPS == 4 ? 32 : 56;

    struct alignas(1024) Shared {
        union {
            struct {
                uint4 table[TABLE / 16];
                uint8_t codes[STAGES][ROWS][LINE / 2];
                uint8_t x[X_STAGES][TOKENS][128];
            };
            struct {
                float sums[TOKENS][ROWS + 4];
                float shares[TOKENS][ROWS + 4]; // of adapters in what the CTA finishes
            };
        };
        float scales[STAGES][ROWS][4];
        Barrier full[STAGES], empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES];
    };

    Shared& shared;
    const Part& part;
    const Table table;
    int row, second;        // of out and the first half's weight; of the second half's
    int token, first, last; // lines [first, last) of K

    __device__ Few(Shared& shared, const Parts& parts, int splits, int lines, bool gated)
        : shared(shared), part(part_of(parts, blockIdx.x / splits)), table(shared.table),
          row((int(blockIdx.x / splits) - part.first_tile) * (gated ? ROWS / 2 : ROWS)),
          second(gated ? row : row + ROWS / 2), token(blockIdx.y * TOKENS),
          first(lines * int(blockIdx.x % splits) / splits), last(lines * int(blockIdx.x % splits + 1) / splits) {}

    __device__ static void init(Shared& shared) {
        for (int i = 0; i < STAGES; ++i)
            shared.full[i].init(2), shared.empty[i].init(4 * GROUPS);
        for (int i = 0; i < X_STAGES; ++i)
            shared.x_full[i].init(1), shared.x_empty[i].init(4 * GROUPS);
        Barrier::publish();
    }

    // Beside adapters x is there before the launch in front, which makes the hidden values, has ended.
    __device__ static void wait_for_x(uint32_t* arrived) {
        if (arrived == nullptr) {
            wait_for_previous_kernel();
            return;
        }
        wait_for_announced_end(arrived, gridDim.x * gridDim.y);
        asm volatile("fence.proxy.async.global;" ::: "memory"); // the copy engine reads it
    }

    // By one thread, before any other has come here.
    __device__ void begin() const {
        init(shared);
        for (int line = first; line < min(first + STAGES, last); ++line)
            copy_codes(line);
    }

    __device__ void copy_codes(int line) const {
        const int stage = (line - first) % STAGES;
        shared.full[stage].arrive_expecting(sizeof shared.codes[stage]);
        copy_box(shared.codes[stage][0], &part.maps[0], line * (LINE / 2), row, shared.full[stage]);
        copy_box(shared.codes[stage][ROWS / 2], &part.maps[1], line * (LINE / 2), second, shared.full[stage]);
    }

    // By one thread: x, once it is there, and the codes that did not fit at first.
    __device__ void copy(const Map& x_map, uint32_t* arrived) const {
        wait_for_x(arrived);
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            if (i >= STAGES) {
                shared.empty[stage].wait(i / STAGES % 2 ^ 1);
                copy_codes(line);
            }
            for (int j = 0; j < 4; ++j) {
                const int block = i * 4 + j, x_stage = block % X_STAGES;
                shared.x_empty[x_stage].wait(block / X_STAGES % 2 ^ 1);
                shared.x_full[x_stage].arrive_expecting(sizeof shared.x[x_stage]);
                copy_box(shared.x[x_stage], &x_map, line * LINE + j * 64, token, shared.x_full[x_stage]);
            }
        }
    }

    // By a warp, for every SCALERS-th line from `turn` on.
    __device__ void decode_scales(int row_blocks, int turn) const {
        for (int line = first + turn; line < last; line += SCALERS) {
            const int i = line - first, stage = i % STAGES;
#pragma unroll
            for (int strip = 0; strip < ROWS; strip += STRIP) {
                uint32_t codes[STRIP / 32];
                float nested[STRIP / 32];
#pragma unroll
                for (int r = 0; r < STRIP / 32; ++r) {
                    const Absmax& absmax = part.absmax[is_second(strip + r * 32)];
                    const uint32_t at = weight_row(strip + r * 32) * row_blocks + line * 4;
                    codes[r] = __ldg(reinterpret_cast<const uint32_t*>(absmax.codes + at));
                    nested[r] = __ldg(absmax.absmax + at / 256);
                }
                if (strip == 0)
                    shared.empty[stage].wait(i / STAGES % 2 ^ 1);
#pragma unroll
                for (int r = 0; r < STRIP / 32; ++r) {
                    const float offset = part.absmax[is_second(strip + r * 32)].offset;
                    float v[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        v[j] = __fadd_rn(__fmul_rn(table.scale(codes[r], j), nested[r]), offset);
                    store16(shared.scales[stage][strip + r * 32 + lane_id()], v);
                }
            }
            release(shared.full[stage]);
        }
    }

    __device__ static bool is_second(int r) { return r >= ROWS / 2; }

    // The row of its weight that row r + lane of the tile is; the last one's instead of those past it.
    __device__ uint32_t weight_row(int r) const {
        return min((is_second(r) ? second - ROWS / 2 : row) + r + lane_id(), part.N - 1);
    }

    __device__ void multiply(float (&total)[TOKENS / 2]) const {
        float sum[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i)
            total[i] = 0;
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            shared.full[stage].wait(i / STAGES % 2);
            const float4 us = *reinterpret_cast<const float4*>(shared.scales[stage][lane_row()]);
            const float4 ls = *reinterpret_cast<const float4*>(shared.scales[stage][lane_row() + 8]);
            const float upper_scales[4] = {us.x, us.y, us.z, us.w}, lower_scales[4] = {ls.x, ls.y, ls.z, ls.w};
            uint32_t a[BUFFERS][4][4];
            if (BUFFERS > 1)
                look_up(stage, 0, a[0]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (BUFFERS == 1)
                    look_up(stage, j, a[0]);
                const int block = i * 4 + j, x_stage = block % X_STAGES;
                shared.x_full[x_stage].wait(block / X_STAGES % 2);
                hold(sum);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                const uint64_t b = swizzled_rows(shared.x[x_stage]);
#pragma unroll
                for (int step = 0; step < 4; ++step)
                    Wgmma<T, TOKENS>::run(sum, a[j % BUFFERS][step], b + step * 2, step > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (BUFFERS > 1 && j < 3)
                    look_up(stage, j + 1, a[(j + 1) % BUFFERS]);
                if (j + BUFFERS == 4)
                    release(shared.empty[stage]);
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                hold(sum);
                if (lane_id() == 0)
                    shared.x_empty[x_stage].arrive();
#pragma unroll
                for (int k = 0; k < TOKENS / 2; ++k)
                    total[k] = __fmaf_rn(k % 4 < 2 ? upper_scales[j] : lower_scales[j], sum[k], total[k]);
            }
        }
    }

    // Each warp that multiplies has sixteen rows of the tile for the adapters' shares, too.
    __device__ static int warp_row() { return threadIdx.x / 32 * 16; }
    __device__ const Share& own_share() const { return part.shares[is_second(warp_row())]; }

    // Of its weight, of which a lane reads B.
    __device__ void rows_of_b(int (&rows)[2]) const {
        const int first = (is_second(warp_row()) ? second - ROWS / 2 : row) + warp_row();
        for (int i = 0; i < 2; ++i)
            rows[i] = min(first + lane_row_of_b(i), part.N - 1);
    }

    // To L2, long before they are multiplied.
    __device__ void prefetch_b(const Hidden& hidden) const {
        int rows[2];
        rows_of_b(rows);
        own_share().prefetch(hidden.adapters_fp32, rows, 0);
    }

    // The adapters' shares in the rows of x that this CTA finishes.
    __device__ void multiply_hidden(const Hidden& hidden, int M, int splits) const {
        constexpr int PAIRS = TOKENS / 16; // of eights of rows of x
        const int share = share_of<TOKENS>(splits), from = blockIdx.x % splits * share;
        const int eights = min(share, TOKENS - from) / 8;
        const Share& own = own_share();
        int rows[2];
        rows_of_b(rows);
        float total[PAIRS][2][4] = {};
#pragma unroll 2
        for (int k = 0; k < own.rank; k += RANKS) {
            RawB raw;
            raw.load(own, hidden.adapters_fp32, rows, k);
            uint2 values[PAIRS][2] = {};
#pragma unroll
            for (int i = 0; i < 2 * PAIRS; ++i)
                if (i < eights)
                    values[i / 2][i % 2] = hidden.load(min(token + from + i * 8 + lane_token(), M - 1), own.column + k);
            uint32_t b[2][2];
            raw.operand<T>(0, hidden.adapters_fp32, b[0]);
            raw.operand<T>(1, hidden.adapters_fp32, b[1]);
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                const uint2(&of)[2] = values[i];
                const uint32_t a[4] = {of[0].x, of[1].x, of[0].y, of[1].y};
                multiply_add(T{}, total[i][0], a, b[0][0], b[0][1]);
                multiply_add(T{}, total[i][1], a, b[1][0], b[1][1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; ++i)
            if (const float (&of)[2][4] = total[i / 2]; i < eights)
                store16(&shared.shares[from + i * 8 + lane_token()][warp_row() + lane_id() % 4 * 4],
                        {of[0][i % 2 * 2], of[0][i % 2 * 2 + 1], of[1][i % 2 * 2], of[1][i % 2 * 2 + 1]});
    }

    __device__ void look_up(int stage, int block, uint32_t (&a)[4][4]) const {
        const auto pair = [&](uint32_t word) { return table.pair(word, lane_id() % 4); };
        Block(shared.codes[stage], block).look_up(pair, pair, a);
    }
};

// TOKENS rows of x in bf16, many, by 128 rows of W.
template <int TOKENS>
struct Many {
    static constexpr int ROWS = 128, MULTIPLIERS = 256;
    static constexpr int STAGES = TOKENS == 256 ? 2 : 3;
    static constexpr int X_STAGES = TOKENS == 256 ? 3 : 6; // of 64 elements of K
    static constexpr int MANY_REGISTERS = 216, FEW_REGISTERS = 72;

    struct alignas(1024) Shared {
        union {
            struct {
                uint4 table[TABLE / 16];
                uint8_t codes[STAGES][ROWS][LINE / 2];
                uint8_t x[X_STAGES][TOKENS][128];
            };
            float sums[TOKENS][ROWS + 4];
        };
        float scales[STAGES][ROWS][BLOCKS];
        Barrier full[STAGES], empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES];
    };

    Shared& shared;
    const Part& part;
    const Table table;
    int row, token, first, last; // of out; lines [first, last) of K

    __device__ Many(Shared& shared, const Parts& parts, int splits, int lines)
        : shared(shared), part(parts.at[0]), table(shared.table), row(blockIdx.x / splits * ROWS),
          token(blockIdx.y * TOKENS), first(lines * int(blockIdx.x % splits) / splits),
          last(lines * int(blockIdx.x % splits + 1) / splits) {}

    // By one thread, before any other has come here.
    __device__ void begin() const {
        for (int i = 0; i < STAGES; ++i)
            shared.full[i].init(2), shared.empty[i].init(MULTIPLIERS / 32);
        for (int i = 0; i < X_STAGES; ++i)
            shared.x_full[i].init(1), shared.x_empty[i].init(MULTIPLIERS / 32);
        Barrier::publish();
        copy_codes(first, min(first + STAGES, last));
    }

    // By one thread.
    __device__ void copy_codes(int from, int to) const {
        for (int line = from; line < to; ++line) {
            const int i = line - first, stage = i % STAGES;
            shared.empty[stage].wait(i / STAGES % 2 ^ 1);
            shared.full[stage].arrive_expecting(sizeof shared.codes[stage]);
            copy_box(shared.codes[stage], &part.maps[0], line * (LINE / 2), row, shared.full[stage]);
        }
    }

    // By one thread.
    __device__ void copy_x(const Map& map) const {
        wait_for_previous_kernel();
        for (int block = 0; block < (last - first) * BLOCKS; ++block) {
            const int stage = block % X_STAGES;
            shared.x_empty[stage].wait(block / X_STAGES % 2 ^ 1);
            shared.x_full[stage].arrive_expecting(sizeof shared.x[stage]);
            copy_box(shared.x[stage], &map, first * LINE + block * 64, token, shared.x_full[stage]);
        }
    }

    // By a warp: scales, times `factor`.
    __device__ void decode_scales(int row_blocks, float factor) const {
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            uint32_t codes[ROWS / 32];
            float nested[ROWS / 32];
#pragma unroll
            for (int r = 0; r < ROWS / 32; ++r) {
                const uint32_t n = min(row + r * 32 + lane_id(), part.N - 1), at = n * row_blocks + line * BLOCKS;
                codes[r] = __ldg(reinterpret_cast<const uint32_t*>(part.absmax[0].codes + at));
                nested[r] = __ldg(part.absmax[0].absmax + at / 256);
            }
            shared.empty[stage].wait(i / STAGES % 2 ^ 1);
#pragma unroll
            for (int r = 0; r < ROWS / 32; ++r) {
                float v[BLOCKS];
#pragma unroll
                for (int j = 0; j < BLOCKS; ++j)
                    v[j] = __fadd_rn(__fmul_rn(table.scale(codes[r], j), nested[r]), part.absmax[0].offset) * factor;
                store16(shared.scales[stage][r * 32 + lane_id()], v);
            }
            release(shared.full[stage]);
        }
    }

    // Weights of one block are looked up while those of the block before it are multiplied.
    __device__ void multiply(float (&sum)[TOKENS / 2]) const {
        uint32_t a[2][4][4];
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            shared.full[stage].wait(i / STAGES % 2);
            const float4 us = *reinterpret_cast<const float4*>(shared.scales[stage][lane_row()]);
            const float4 ls = *reinterpret_cast<const float4*>(shared.scales[stage][lane_row() + 8]);
            const float upper[BLOCKS] = {us.x, us.y, us.z, us.w}, lower[BLOCKS] = {ls.x, ls.y, ls.z, ls.w};
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                Block(shared.codes[stage], j)
                    .look_up([&](uint32_t word) { return weights(word, upper[j]); },
                             [&](uint32_t word) { return weights(word, lower[j]); }, a[j % 2]);
                if (j + 1 == BLOCKS)
                    release(shared.empty[stage]);
                const int block = i * BLOCKS + j;
                shared.x_full[block % X_STAGES].wait(block / X_STAGES % 2);
                hold(sum);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                const uint64_t b = swizzled_rows(shared.x[block % X_STAGES]);
#pragma unroll
                for (int step = 0; step < 4; ++step)
                    Wgmma<bf16, TOKENS>::run(sum, a[j % 2][step], b + step * 2, block > 0 || step > 0);
                asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (block > 0)
                    release(shared.x_empty[(block - 1) % X_STAGES]);
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(sum);
    }

    // The table holds fp16, which has more bits than a rounded weight of bf16.
    __device__ uint32_t weights(uint32_t word, float scale) const {
        const uint32_t pair = table.pair(word, lane_id() % 4);
        return narrow2<bf16>(widen(f16{uint16_t(pair)}) * scale, widen(f16{uint16_t(pair >> 16)}) * scale);
    }
};

template <typename T, int TOKENS, int GROUPS>
__device__ void multiply_few(const Parts& parts, const Map& x_map, int M, int K, int splits, bool gated,
                             const Codebook& codebook, float gain) {
    using Tile = Few<T, TOKENS, GROUPS>;
    using Shared = typename Tile::Shared;
    extern __shared__ char dynamic[];
    // Swizzling goes by addresses.
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + (-shared_address(dynamic) & 1023));
    let_next_kernel_start();
    const Tile tile(shared, parts, splits, K / LINE, gated);
    const int job = int(threadIdx.x / 32) - 4 * GROUPS; // below 0: multiplies
    if (job == 0 && lane_id() == 0)
        tile.begin();
    else if (job < 0) {
        fill_tables<T>(shared.table, Tile::MULTIPLIERS, parts, codebook, gain);
        tile.prefetch_b(parts.hidden);
    }
    __syncthreads();
    if (job < 0) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Tile::MANY_REGISTERS));
        float total[TOKENS / 2];
        tile.multiply(total);
        publish<TOKENS, Tile::ROWS>(shared.sums, total, lane_row());
        wait_for_previous_kernel();
        if (parts.hidden.ranks > 0)
            tile.multiply_hidden(parts.hidden, M, splits);
        cluster_sync();
        finish<T, TOKENS, Tile::ROWS>(shared.sums, shared.shares, tile.part, tile.row, tile.token, M, splits, gated,
                                      1.0f / gain);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Tile::FEW_REGISTERS));
        if (job == 0 && lane_id() == 0)
            tile.copy(x_map, parts.hidden.arrived);
        else if (job > 0 && job <= Tile::SCALERS)
            tile.decode_scales(K / 64, job - 1);
        __syncwarp();
        cluster_sync();
    }
    cluster_sync(); // the others may still be reading here
}

template <int TOKENS>
__device__ void multiply_many(const Parts& parts, const Map& x_map, int M, int K, int splits, bool,
                              const Codebook& codebook, float gain) {
    using Tile = Many<TOKENS>;
    using Shared = typename Tile::Shared;
    extern __shared__ char dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + (-shared_address(dynamic) & 1023));
    let_next_kernel_start();
    const Tile tile(shared, parts, splits, K / LINE);
    const int job = int(threadIdx.x / 32) - Tile::MULTIPLIERS / 32; // below 0: multiplies
    if (job == 0 && lane_id() == 0)
        tile.begin();
    else if (job < 0)
        fill_tables<f16>(shared.table, Tile::MULTIPLIERS, parts, codebook, gain);
    __syncthreads();
    if (job < 0) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Tile::MANY_REGISTERS));
        float sum[TOKENS / 2];
        tile.multiply(sum);
        publish<TOKENS, Tile::ROWS>(shared.sums, sum, lane_row());
        cluster_sync();
        wait_for_previous_kernel();
        finish<bf16, TOKENS, Tile::ROWS>(shared.sums, nullptr, tile.part, tile.row, tile.token, M, splits, false, 1.0f);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Tile::FEW_REGISTERS));
        if (job == 0 && lane_id() == 0)
            tile.copy_codes(min(tile.first + Tile::STAGES, tile.last), tile.last);
        else if (job == 1 && lane_id() == 0)
            tile.copy_x(x_map);
        else if (job == 2)
            tile.decode_scales(K / 64, 1.0f / gain);
        __syncwarp();
        cluster_sync();
    }
    cluster_sync(); // the others may still be reading here
}

#define HAS_SIZE(shared_bytes, ...)                                                                                    \
    static_assert(sizeof(__VA_ARGS__::Shared) == shared_bytes, "the launcher asks for so much");

#else

#define HAS_SIZE(shared_bytes, ...)

template <typename T, int TOKENS, int GROUPS>
__device__ void multiply_few(const Parts&, const Map&, int, int, int, bool, const Codebook&, float) {}

template <int TOKENS>
__device__ void multiply_many(const Parts&, const Map&, int, int, int, bool, const Codebook&, float) {}

#endif

// Maps: boxes of 128 bytes by the tile's rows of packed [N, K / 2], half of them where those of x are few, and by
// `tokens` rows of x [M, K], swizzled; nested absmax with one map for all and codes 4-byte
// aligned, blocks of 64, K % 256 == 0, N * K < 2^38; parts: unused ones begin past the last tile, many rows of x have
// one part and no gate; grid (tiles of W * splits, tiles of x), clusters of `splits`, at most K / 256 and MAX_SPLITS.
#define GEMM_4BIT(name, threads, multiply)                                                                             \
    extern "C" __global__ void __launch_bounds__(threads, 1)                                                           \
        gemm_4bit_##name(const __grid_constant__ Parts parts, const __grid_constant__ Map x_map, int M, int K,         \
                         int splits, bool gated, const __grid_constant__ Codebook codebook, float gain) {              \
        multiply(parts, x_map, M, K, splits, gated, codebook, gain);                                                   \
    }
#define GEMM_4BIT_FEW(T, dtype, tokens, groups, shared_bytes)                                                          \
    HAS_SIZE(shared_bytes, Few<T, tokens, groups>)                                                                     \
    GEMM_4BIT(tokens##x##groups##_##dtype, 128 * (groups + 1), (multiply_few<T, tokens, groups>))
#define GEMM_4BIT_MANY(tokens, shared_bytes)                                                                           \
    HAS_SIZE(shared_bytes, Many<tokens>)                                                                               \
    GEMM_4BIT(many_##tokens##_bf16, 384, multiply_many<tokens>)

#define GEMM_4BIT_TILES(T, dtype)                                                                                      \
    GEMM_4BIT_FEW(T, dtype, 32, 2, 171008)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 32, 3, 182272)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 32, 4, 173056)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 64, 2, 220160)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 64, 3, 215040)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 64, 4, 205824)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 128, 2, 220160)

GEMM_4BIT_TILES(f16, f16)
GEMM_4BIT_TILES(bf16, bf16)
GEMM_4BIT_MANY(128, 220160)
GEMM_4BIT_MANY(256, 201728)
