// x Wᵀ of tens to hundreds of rows x on Hopper's warpgroup instructions, from the checkpoint's bytes.
//
// W is operand A of wgmma, out of registers: bytes become pairs of values in a table, and scales enter the fp32 sums
// of a block, so that the only rounding of a weight is that of sixteen constants. x is operand B, out of shared memory,
// where the copy engine puts it; a small kernel before this one writes it in the order in which the bytes of W feed the
// contraction. The CTAs of a cluster share a tile of out and split K; each adds up a part of their sums, in order.
#include "absmax.cuh"
#include "codes.cuh"
#include "memory.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "pipeline.cuh"

// A tensor map of the driver.
struct alignas(64) Map {
    uint8_t bytes[128];
};

struct Codebook {
    float values[16];
};

// Sixteen bytes a thread: the pairs of elements that one step of the contraction takes of a block of 64.
extern "C" __global__ void __launch_bounds__(256) gemm_4bit_permute(const uint32_t* x, uint4* out, int64_t chunks) {
    let_next_kernel_start();
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    wait_for_previous_kernel();
    if (i >= chunks)
        return;
    const uint32_t* from = x + i / 8 * 32 + i % 8;
    out[i] = make_uint4(from[0], from[8], from[16], from[24]);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int LINE = 256; // weights of a row of one stage: 128 bytes
constexpr int MAX_SPLITS = 4;

// `sum` (+)= a b of 64 rows of W, N rows of x and 16 elements of K; b: a descriptor of shared memory.
template <typename T, int N>
struct Wgmma;

#define D8(i)                                                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define S0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define S1 S0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define S2 S1 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define S3                                                                                                             \
    S2 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"                                              \
       ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

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
    WGMMA(T, dtype, 16, S0, "%8,%9,%10,%11", "%12", "%13", D8(0))                                                      \
    WGMMA(T, dtype, 32, S1, "%16,%17,%18,%19", "%20", "%21", D8(0), D8(8))                                             \
    WGMMA(T, dtype, 64, S2, "%32,%33,%34,%35", "%36", "%37", D8(0), D8(8), D8(16), D8(24))                             \
    WGMMA(T, dtype, 128, S3, "%64,%65,%66,%67", "%68", "%69", D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48),    \
          D8(56))

WGMMAS(bf16, bf16)
WGMMAS(f16, f16)

// Rows of 128 bytes, whose 16-byte chunks are swizzled by the row's place among eight.
__device__ inline uint64_t swizzled_rows(const void* p) {
    return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

// The compiler may not move accesses to registers that wgmma is still writing.
template <int N>
__device__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+f"(d[i])::"memory");
}

__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline float4 load_of_cluster(const float* p, int rank) {
    uint32_t address;
    float4 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address));
    return v;
}

// TOKENS rows of x by 64 * GROUPS rows of W.
template <typename T, int TOKENS, int GROUPS>
struct Tile {
    static constexpr int ROWS = 64 * GROUPS, MULTIPLIERS = 128 * GROUPS, THREADS = MULTIPLIERS + 128;
    static constexpr int STAGES = GROUPS == 2 ? 3 : 2;
    static constexpr int X_STAGES = TOKENS > 64 ? 6 : GROUPS == 2 ? 12 : 8; // of 64 elements of K
    // A warp more could run a whole turn of the ring ahead, where parities repeat.
    static constexpr int SCALERS = STAGES;
    // Values of a second block are looked up while one is multiplied, where registers allow.
    static constexpr int BUFFERS = TOKENS * GROUPS >= 256 && GROUPS == 4 ? 1 : 2;
    // Of the registers that THREADS get at launch, those who multiply take most.
    static constexpr int MANY_REGISTERS = GROUPS == 2 ? 216 : 112, FEW_REGISTERS = GROUPS == 2 ? 56 : 32;

    struct alignas(1024) Shared {
        union {
            struct {
                uint4 table[TABLE / 16];
                uint8_t codes[STAGES][ROWS][LINE / 2];
                uint8_t x[X_STAGES][TOKENS][128];
            };
            float sums[TOKENS][ROWS + 4];
        };
        float scales[STAGES][ROWS][4];
        Barrier full[STAGES], empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES];
    };

    Shared& shared;
    const Table table;
    int row, token, first, last; // of out; lines [first, last) of K

    __device__ Tile(Shared& shared, int splits, int lines)
        : shared(shared), table(shared.table), row(blockIdx.x / splits * ROWS), token(blockIdx.y * TOKENS),
          first(lines * int(blockIdx.x % splits) / splits), last(lines * int(blockIdx.x % splits + 1) / splits) {}

    __device__ static void init(Shared& shared) {
        for (int i = 0; i < STAGES; ++i)
            shared.full[i].init(2), shared.empty[i].init(4 * GROUPS);
        for (int i = 0; i < X_STAGES; ++i)
            shared.x_full[i].init(1), shared.x_empty[i].init(4 * GROUPS);
        Barrier::publish();
    }

    // By one thread. Weights may be read before the previous kernel has ended, x may not.
    __device__ void copy(const Map& weight_map, const Map& x_map) const {
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            shared.empty[stage].wait(i / STAGES % 2 ^ 1);
            shared.full[stage].arrive_expecting(sizeof shared.codes[stage]);
            copy_box(shared.codes[stage], &weight_map, line * (LINE / 2), row, shared.full[stage]);
            if (i == 0)
                wait_for_previous_kernel();
            for (int j = 0; j < 4; ++j) {
                const int block = i * 4 + j, x_stage = block % X_STAGES;
                shared.x_empty[x_stage].wait(block / X_STAGES % 2 ^ 1);
                shared.x_full[x_stage].arrive_expecting(sizeof shared.x[x_stage]);
                copy_box(shared.x[x_stage], &x_map, line * LINE + j * 64, token, shared.x_full[x_stage]);
            }
        }
    }

    // By a warp, for every SCALERS-th line from `turn` on.
    __device__ void decode_scales(const Absmax& absmax, int N, int row_blocks, int turn) const {
        for (int line = first + turn; line < last; line += SCALERS) {
            const int i = line - first, stage = i % STAGES;
#pragma unroll 1
            for (int part = 0; part < ROWS; part += 128) {
                uint32_t codes[4];
                float nested[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const uint32_t n = min(row + part + r * 32 + lane_id(), N - 1), at = n * row_blocks + line * 4;
                    codes[r] = __ldg(reinterpret_cast<const uint32_t*>(absmax.codes + at));
                    nested[r] = __ldg(absmax.absmax + at / 256);
                }
                if (part == 0)
                    shared.empty[stage].wait(i / STAGES % 2 ^ 1);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    float v[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        v[j] = __fadd_rn(__fmul_rn(table.scale(codes[r], j), nested[r]), absmax.offset);
                    store16(shared.scales[stage][part + r * 32 + lane_id()], v);
                }
            }
            __syncwarp();
            if (lane_id() == 0)
                shared.full[stage].arrive();
        }
    }

    // The row of the tile whose codes this lane looks up for row lane / 4 of its warp's sixteen: eight rows are taken
    // in an order in which their swizzled chunks lie in different banks.
    __device__ static int lane_row() { return threadIdx.x / 32 * 16 + lane_id() / 4 % 4 * 2 + lane_id() / 16; }

    __device__ void multiply(float (&total)[TOKENS / 2]) const {
        const int mine = lane_row(), t = lane_id() % 4;
        float sum[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i)
            total[i] = 0;
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            shared.full[stage].wait(i / STAGES % 2);
            uint2 upper[4], lower[4]; // codes of four blocks of this row and of that eight below
            const uint8_t* from = &shared.codes[stage][mine][t % 2 * 8];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int chunk = ((2 * j + t / 2) ^ mine % 8) * 16;
                upper[j] = *reinterpret_cast<const uint2*>(from + chunk);
                lower[j] = *reinterpret_cast<const uint2*>(from + 8 * (LINE / 2) + chunk);
            }
            const float4 us = *reinterpret_cast<const float4*>(shared.scales[stage][mine]);
            const float4 ls = *reinterpret_cast<const float4*>(shared.scales[stage][mine + 8]);
            const float upper_scales[4] = {us.x, us.y, us.z, us.w}, lower_scales[4] = {ls.x, ls.y, ls.z, ls.w};
            __syncwarp();
            if (lane_id() == 0)
                shared.empty[stage].arrive();
            uint32_t a[BUFFERS][4][4];
            if (BUFFERS > 1)
                look_up(upper[0], lower[0], a[0]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (BUFFERS == 1)
                    look_up(upper[j], lower[j], a[0]);
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
                    look_up(upper[j + 1], lower[j + 1], a[(j + 1) % BUFFERS]);
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

    // Operand A of the four steps of a block.
    __device__ void look_up(uint2 upper, uint2 lower, uint32_t (&a)[4][4]) const {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const uint32_t u = step / 2 ? upper.y : upper.x, l = step / 2 ? lower.y : lower.x;
            const int byte = step % 2 * 2;
            a[step][0] = table.pair(u, byte), a[step][1] = table.pair(l, byte);
            a[step][2] = table.pair(u, byte + 1), a[step][3] = table.pair(l, byte + 1);
        }
    }

    // Sums take the place of the stages, which all who multiply have read.
    __device__ void publish(const float (&total)[TOKENS / 2]) const {
        asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory");
        const int mine = lane_row();
#pragma unroll
        for (int k = 0; k < TOKENS / 2; k += 4) {
            const int m = k * 2 + lane_id() % 4 * 2;
            shared.sums[m][mine] = total[k], shared.sums[m + 1][mine] = total[k + 1];
            shared.sums[m][mine + 8] = total[k + 2], shared.sums[m + 1][mine + 8] = total[k + 3];
        }
    }

    // Each CTA of the cluster finishes an equal share of the rows of x.
    __device__ void finish(T* out, int M, int N, int splits, float factor) const {
        const int share = TOKENS / splits, rank = blockIdx.x % splits;
        for (int e = threadIdx.x; e < share * (ROWS / 4); e += MULTIPLIERS) {
            const int m = rank * share + e / (ROWS / 4), r = e % (ROWS / 4) * 4;
            float4 v[MAX_SPLITS];
#pragma unroll
            for (int split = 0; split < MAX_SPLITS; ++split)
                v[split] = split < splits ? load_of_cluster(&shared.sums[m][r], split) : make_float4(0, 0, 0, 0);
            float4 sum = v[0];
#pragma unroll
            for (int split = 1; split < MAX_SPLITS; ++split)
                sum.x += v[split].x, sum.y += v[split].y, sum.z += v[split].z, sum.w += v[split].w;
            const float values[4] = {sum.x, sum.y, sum.z, sum.w};
            T* to = out + int64_t(token + m) * N + row + r;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (token + m < M && row + r + i < N)
                    to[i] = narrow<T>(values[i] * factor);
        }
    }
};

template <typename T, int TOKENS, int GROUPS>
__device__ void gemm(const Map& weight_map, const Map& x_map, const Absmax& absmax, T* out, int M, int N, int K,
                     int splits, const Codebook& codebook, float gain) {
    using OneTile = Tile<T, TOKENS, GROUPS>;
    using Shared = typename OneTile::Shared;
    extern __shared__ char dynamic[];
    // Swizzling goes by addresses.
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + (-shared_address(dynamic) & 1023));
    let_next_kernel_start();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == OneTile::MULTIPLIERS)
        OneTile::init(shared);
    if (warp < 4 * GROUPS) {
        const float entry = codebook.values[lane_id() % 16] * gain;
        fill_table(shared.table, 0, OneTile::MULTIPLIERS,
                   [&](int b) { return narrow2<T>(lookup16(entry, b >> 4), lookup16(entry, b)); });
        fill_table(shared.table, 1, OneTile::MULTIPLIERS,
                   [&](int b) { return __float_as_uint(__ldg(absmax.map + b)); });
    }
    __syncthreads();
    const OneTile tile(shared, splits, (K + LINE - 1) / LINE);
    if (warp < 4 * GROUPS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OneTile::MANY_REGISTERS));
        float total[TOKENS / 2];
        tile.multiply(total);
        tile.publish(total);
        cluster_sync();
        wait_for_previous_kernel();
        tile.finish(out, M, N, splits, 1.0f / gain);
        cluster_sync(); // the others may still be reading here
        return;
    }
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(OneTile::FEW_REGISTERS));
    const int job = warp - 4 * GROUPS;
    if (job == 0 && lane_id() == 0)
        tile.copy(weight_map, x_map);
    else if (job > 0 && job <= OneTile::SCALERS)
        tile.decode_scales(absmax, N, K / 64, job - 1);
    __syncwarp();
    cluster_sync();
    cluster_sync();
}

#define HAS_SIZE(T, tokens, groups, shared_bytes)                                                                      \
    static_assert(sizeof(Tile<T, tokens, groups>::Shared) == shared_bytes, "the launcher asks for so much");

#else

#define HAS_SIZE(T, tokens, groups, shared_bytes)

template <typename T, int TOKENS, int GROUPS>
__device__ void gemm(const Map&, const Map&, const Absmax&, T*, int, int, int, int, const Codebook&, float) {}

#endif

// Maps: boxes of 128 bytes by 64 * groups rows of packed [N, K / 2], and by `tokens` rows of the permuted x [M, K],
// swizzled; nested absmax with codes 4-byte aligned, blocks of 64, K % 256 == 0, N * K < 2^38; grid (tiles of W *
// splits, tiles of x), clusters of `splits`, at most K / 256 and MAX_SPLITS.
#define GEMM_4BIT(T, dtype, tokens, groups, shared_bytes)                                                              \
    HAS_SIZE(T, tokens, groups, shared_bytes)                                                                          \
    extern "C" __global__ void __launch_bounds__(128 * (groups + 1), 1) gemm_4bit_##tokens##x##groups##_##dtype(       \
        const __grid_constant__ Map weight_map, const __grid_constant__ Map x_map, Absmax absmax, T* out, int M,       \
        int N, int K, int splits, const __grid_constant__ Codebook codebook, float gain) {                             \
        gemm<T, tokens, groups>(weight_map, x_map, absmax, out, M, N, K, splits, codebook, gain);                      \
    }

#define GEMM_4BIT_TILES(T, dtype)                                                                                      \
    GEMM_4BIT(T, dtype, 16, 2, 146432)                                                                                 \
    GEMM_4BIT(T, dtype, 16, 4, 156672)                                                                                 \
    GEMM_4BIT(T, dtype, 32, 2, 171008)                                                                                 \
    GEMM_4BIT(T, dtype, 32, 4, 173056)                                                                                 \
    GEMM_4BIT(T, dtype, 64, 2, 220160)                                                                                 \
    GEMM_4BIT(T, dtype, 64, 4, 205824)                                                                                 \
    GEMM_4BIT(T, dtype, 128, 2, 220160)

GEMM_4BIT_TILES(f16, f16)
GEMM_4BIT_TILES(bf16, bf16)
