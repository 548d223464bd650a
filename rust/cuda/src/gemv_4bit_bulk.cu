// The product of gemv_4bit for x of 16 bits where bulk copies exist: W streams through a ring in shared memory.
//
// As in gemv_4bit_mma, W is operand A of mma.m16n8k16, bytes become pairs of values in a table, and scales enter the
// fp32 sums. But here every warp has one job, and barriers in shared memory are all that connects them: one warp
// copies codes, two decode scales, sixteen multiply, one adds up what they made. So memory is read without a pause
// while the table, which is what bounds the kernel, is never without work.
//
// A warp that multiplies keeps its part of x in registers: four blocks of 64 of a slice of K. The CTA takes its panels
// of 16 rows of W one after the other, and for a long K some panels together, slice by slice. The order of every sum
// follows from K alone; thus a row of out depends neither on the other rows of x nor on the number of CTAs.
#include "absmax.cuh"
#include "codes.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "pipeline.cuh"

constexpr int WARPS = 16; // that multiply
constexpr int SCALERS = 2;
constexpr int ALL_WARPS = WARPS + SCALERS + 2;
constexpr int MAX_PARTS = 4;

struct Codebook {
    float values[16];
};

// One weight [N, K] and where its product goes, laid out as the launcher's `Part`.
struct Part {
    const uint8_t* packed;
    Absmax absmax;
    void* out;
    int N, first_panel;
};

struct Parts {
    Part at[MAX_PARTS];
};

#if __CUDA_ARCH__ >= 900

constexpr int SHARED_BYTES = 169536;
constexpr int STAGES = 2;
constexpr int SUM_BUFFERS = 2;
constexpr int PANEL = 16; // rows of W of one mma
constexpr int TILE = 8;   // rows of x of one mma
constexpr int QUAD = 4;   // blocks of a slice that one warp multiplies
constexpr int SLICE = WARPS * QUAD;
constexpr int GROUP = 16; // panels that go through the slices of K together
// Eight rows of 32 bytes lie in different banks.
constexpr int ROW_BYTES = SLICE * 32 + 32;
constexpr int SCALE_ROW = SLICE + 4;
constexpr int SUM_ROW = PANEL + 4;

struct Shared {
    uint4 table[TABLE / 16];
    uint8_t codes[STAGES][PANEL][ROW_BYTES];
    float scales[STAGES][PANEL][SCALE_ROW];
    float sums[SUM_BUFFERS][WARPS][TILE][SUM_ROW];
    float kept[GROUP][TILE][PANEL]; // of the slices so far
    Barrier full[STAGES], empty[STAGES], summed[SUM_BUFFERS], taken[SUM_BUFFERS];
};

// One panel of one slice of K.
struct Item {
    int index, panel, block, blocks; // blocks [block, block + blocks) of each row
    int place;                       // of the panel in its group
    bool is_first, is_last;          // slice

    __device__ int stage() const { return index % STAGES; }
    __device__ int stage_parity() const { return index / STAGES % 2; }
    __device__ int buffer() const { return index % SUM_BUFFERS; }
    __device__ int buffer_parity() const { return index / SUM_BUFFERS % 2; }
};

// The CTA's items, in the order in which every warp goes through them.
struct Walk {
    int first, last, blocks, slice; // panels [first, last); blocks of a row, of a slice

    template <typename Job>
    __device__ void each(Job&& job) const {
        int index = 0;
        for (int group = first; group < last; group += GROUP)
            for (int block = 0; block < blocks; block += slice) {
                const int count = min(slice, blocks - block);
                job.begin_slice(block, count);
                for (int panel = group; panel < min(group + GROUP, last); ++panel, ++index)
                    job.run({index, panel, block, count, panel - group, block == 0, block + slice >= blocks});
            }
    }
};

__device__ inline const Part& part_of(const Parts& parts, int panel) {
    int i = 0;
    while (i + 1 < MAX_PARTS && panel >= parts.at[i + 1].first_panel)
        ++i;
    return parts.at[i];
}

struct Copy {
    Shared& shared;
    const Parts& parts;
    int row_blocks;

    __device__ void begin_slice(int, int) const {}

    // Rows past the last repeat it.
    __device__ void run(const Item& item) const {
        Barrier& full = shared.full[item.stage()];
        shared.empty[item.stage()].wait(item.stage_parity() ^ 1);
        const Part& part = part_of(parts, item.panel);
        const int row = (item.panel - part.first_panel) * PANEL, last = part.N - 1 - row, bytes = item.blocks * 32;
        const uint8_t* from = part.packed + (int64_t(row) * row_blocks + item.block) * 32;
        const bool leader = lane_id() == 0;
        if (leader)
            full.arrive_expecting(PANEL * bytes);
        __syncwarp();
#pragma unroll
        for (int r = 0; r < PANEL; ++r)
            copy_bulk(shared.codes[item.stage()][r], from + int64_t(min(r, last)) * row_blocks * 32, bytes, full,
                      leader);
    }
};

// Each of the warps takes every SCALERS-th item, so that the loads of one are under way while another is decoded.
struct DecodeScales {
    Shared& shared;
    const Parts& parts;
    const Table& table;
    int row_blocks, turn;

    static constexpr int QUADS = SLICE / QUAD, ROWS = 32 / QUADS, LOADS = PANEL / ROWS;

    __device__ void begin_slice(int, int) const {}

    __device__ void run(const Item& item) const {
        if (item.index % SCALERS != turn)
            return;
        const Part& part = part_of(parts, item.panel);
        const int row = (item.panel - part.first_panel) * PANEL + lane_id() / QUADS;
        const int block = item.block + min(lane_id() % QUADS * QUAD, item.blocks - QUAD);
        uint32_t codes[LOADS];
        float nested[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const uint32_t at = uint32_t(min(row + i * ROWS, part.N - 1)) * row_blocks + block;
            codes[i] = __ldg(reinterpret_cast<const uint32_t*>(part.absmax.codes + at));
            nested[i] = __ldg(part.absmax.absmax + at / 256);
        }
        const float offset = part.absmax.offset;
        shared.empty[item.stage()].wait(item.stage_parity() ^ 1);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            float v[QUAD];
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
                v[j] = __fadd_rn(__fmul_rn(table.scale(codes[i], j), nested[i]), offset);
            float* to = &shared.scales[item.stage()][i * ROWS + lane_id() / QUADS][lane_id() % QUADS * QUAD];
            store16(to, v);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.full[item.stage()].arrive();
    }
};

template <typename T>
struct Multiply {
    Shared& shared;
    const Table& table;
    const T* x; // this lane's first element of its row, null for a row that is not there
    int warp, rows_x;
    uint4 (&fragments)[QUAD][2];

    // Elements in the order in which the bytes of W feed the contraction; zeros where x has no row.
    __device__ void begin_slice(int block, int blocks) const {
        const uint4* from = reinterpret_cast<const uint4*>(x + (block + warp * QUAD) * 64);
        const bool loads = x != nullptr && warp * QUAD < blocks;
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                fragments[j][i] = loads ? __ldg(from + j * 8 + i) : make_uint4(0, 0, 0, 0);
    }

    __device__ void run(const Item& item) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
        const bool works = warp * QUAD < item.blocks;
        uint2 upper[QUAD], lower[QUAD]; // codes of rows g and g + 8
        float4 upper_scales, lower_scales;
        shared.full[item.stage()].wait(item.stage_parity());
        if (works) {
            const uint8_t* from = &shared.codes[item.stage()][g][warp * QUAD * 32 + t * 8];
#pragma unroll
            for (int j = 0; j < QUAD; ++j) {
                upper[j] = *reinterpret_cast<const uint2*>(from + j * 32);
                lower[j] = *reinterpret_cast<const uint2*>(from + 8 * ROW_BYTES + j * 32);
            }
            upper_scales = *reinterpret_cast<const float4*>(&shared.scales[item.stage()][g][warp * QUAD]);
            lower_scales = *reinterpret_cast<const float4*>(&shared.scales[item.stage()][g + 8][warp * QUAD]);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.empty[item.stage()].arrive();
        float total[4] = {};
        if (works) {
            const float up[QUAD] = {upper_scales.x, upper_scales.y, upper_scales.z, upper_scales.w};
            const float low[QUAD] = {lower_scales.x, lower_scales.y, lower_scales.z, lower_scales.w};
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
                multiply_block(upper[j], lower[j], up[j], low[j], fragments[j], total);
        }
        shared.taken[item.buffer()].wait(item.buffer_parity() ^ 1);
        store(shared.sums[item.buffer()][warp], total);
        __syncwarp();
        if (lane_id() == 0)
            shared.summed[item.buffer()].arrive();
    }

    __device__ void multiply_block(uint2 upper, uint2 lower, float up, float low, const uint4 (&b)[2],
                                   float (&total)[4]) const {
        float sum[4] = {};
#pragma unroll
        for (int word = 0; word < 2; ++word) {
            const uint32_t u = word ? upper.y : upper.x, l = word ? lower.y : lower.x;
            const uint32_t a0[4] = {table.pair(u, 0), table.pair(l, 0), table.pair(u, 1), table.pair(l, 1)};
            const uint32_t a1[4] = {table.pair(u, 2), table.pair(l, 2), table.pair(u, 3), table.pair(l, 3)};
            multiply_add(T{}, sum, a0, b[word].x, b[word].y);
            multiply_add(T{}, sum, a1, b[word].z, b[word].w);
        }
        total[0] = __fmaf_rn(up, sum[0], total[0]);
        total[1] = __fmaf_rn(up, sum[1], total[1]);
        total[2] = __fmaf_rn(low, sum[2], total[2]);
        total[3] = __fmaf_rn(low, sum[3], total[3]);
    }

    __device__ void store(float (&sums)[TILE][SUM_ROW], const float (&total)[4]) const {
        const int g = lane_id() / 4, m = lane_id() % 4 * 2;
        if (m < rows_x)
            sums[m][g] = total[0], sums[m][g + 8] = total[2];
        if (m + 1 < rows_x)
            sums[m + 1][g] = total[1], sums[m + 1][g + 8] = total[3];
    }
};

// Adds the warps' sums in ascending order of K, and those of the slices.
template <typename T>
struct Finish {
    Shared& shared;
    const Parts& parts;
    int first_row, rows_x;
    float factor;

    __device__ void begin_slice(int, int) const {}

    __device__ void run(const Item& item) const {
        shared.summed[item.buffer()].wait(item.buffer_parity());
        const int m = lane_id() / 4, r = lane_id() % 4 * 4;
        if (m < rows_x)
            add(item, m, r);
        __syncwarp();
        if (lane_id() == 0)
            shared.taken[item.buffer()].arrive();
    }

    // Four rows of W, one of x.
    __device__ void add(const Item& item, int m, int r) const {
        float4& kept = *reinterpret_cast<float4*>(&shared.kept[item.place][m][r]);
        float4 sum = item.is_first ? make_float4(0, 0, 0, 0) : kept;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp)
            if (warp * QUAD < item.blocks) {
                const float4 v = *reinterpret_cast<const float4*>(&shared.sums[item.buffer()][warp][m][r]);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
        if (!item.is_last) {
            kept = sum;
            return;
        }
        const Part& part = part_of(parts, item.panel);
        const int n = (item.panel - part.first_panel) * PANEL + r;
        T* out = static_cast<T*>(part.out) + int64_t(first_row + m) * part.N + n;
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (n + i < part.N)
                out[i] = narrow<T>(values[i] * factor);
    }
};

__device__ inline void init_barriers(Shared& shared) {
    for (int i = 0; i < STAGES; ++i)
        shared.full[i].init(2), shared.empty[i].init(WARPS);
    for (int i = 0; i < SUM_BUFFERS; ++i)
        shared.summed[i].init(WARPS), shared.taken[i].init(1);
    Barrier::publish();
}

template <typename T>
__device__ void gemv_bulk(const T* x, const Parts& parts, int rows_x, int panels, int K, const Codebook& codebook,
                          float gain) {
    extern __shared__ uint4 dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, blocks = K / 64, slices = (blocks + SLICE - 1) / SLICE;
    const int slice = ((blocks + slices - 1) / slices + QUAD - 1) / QUAD * QUAD;
    const int share = panels / gridDim.x, rest = panels % gridDim.x;
    const int first = blockIdx.x * share + min(int(blockIdx.x), rest), last = first + share + (int(blockIdx.x) < rest);
    const Walk walk{first, last, blocks, slice};

    if (warp == WARPS) {
        if (lane_id() == 0)
            init_barriers(shared);
        __syncwarp();
        asm volatile("bar.arrive 1, %0;" ::"n"(32 * ALL_WARPS) : "memory");
        walk.each(Copy{shared, parts, blocks});
        return;
    }
    if (warp < WARPS) {
        const float entry = codebook.values[lane_id() % 16] * gain;
        fill_table(shared.table, 0, 32 * WARPS,
                   [&](int b) { return narrow2<T>(lookup16(entry, b >> 4), lookup16(entry, b)); });
        fill_table(shared.table, 1, 32 * WARPS,
                   [&](int b) { return __float_as_uint(__ldg(parts.at[0].absmax.map + b)); });
    }
    asm volatile("bar.sync 1, %0;" ::"n"(32 * ALL_WARPS) : "memory");

    const Table table = Table::first(dynamic);
    const int first_row = blockIdx.y * TILE;
    rows_x = min(rows_x - first_row, TILE);
    if (warp < WARPS) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        const T* row = g < rows_x ? x + int64_t(first_row + g) * K + 16 * t : nullptr;
        uint4 fragments[QUAD][2];
        wait_for_previous_kernel();
        walk.each(Multiply<T>{shared, table, row, warp, rows_x, fragments});
    } else if (warp <= WARPS + SCALERS) {
        walk.each(DecodeScales{shared, parts, table, blocks, warp - WARPS - 1});
    } else {
        wait_for_previous_kernel();
        walk.each(Finish<T>{shared, parts, first_row, rows_x, 1.0f / gain});
    }
}

static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for so much");

#else

template <typename T>
__device__ void gemv_bulk(const T*, const Parts&, int, int, int, const Codebook&, float) {}

#endif

// x [rows_x, K] and packed 16-byte aligned, nested absmax with one map for all and codes 4-byte aligned, blocks of 64,
// K % 256 == 0, every N * K < 2^38; panels: of all parts; unused parts begin past them; grid (any, tiles of x).
#define GEMV_4BIT_BULK(T, dtype)                                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * ALL_WARPS, 1)                                                    \
        gemv_4bit_bulk_##dtype(const T* x, const __grid_constant__ Parts parts, int rows_x, int panels, int K,         \
                               const __grid_constant__ Codebook codebook, float gain) {                                \
        gemv_bulk<T>(x, parts, rows_x, panels, K, codebook, gain);                                                     \
    }

GEMV_4BIT_BULK(f16, f16)
GEMV_4BIT_BULK(bf16, bf16)
