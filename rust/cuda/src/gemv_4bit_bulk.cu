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
//
// A chain is several such products in one launch, each of what the one before has made: the CTAs meet between them,
// and while they wait the ring fills with the next weights. There x may be normed as it is read, and what is summed up
// may get a bias, an adapter's share, go through SwiGLU and join the residual stream, each rounded as the operation of
// that name rounds it.
#include "absmax.cuh"
#include "codes.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "pipeline.cuh"
#include "sigmoid.cuh"

constexpr int WARPS = 16; // that multiply
constexpr int SCALERS = 2;
constexpr int ALL_WARPS = WARPS + SCALERS + 2;
constexpr int MAX_PARTS = 4;
constexpr int MAX_PHASES = 4;

struct Codebook {
    float values[16];
};

// A weight [N, K] and the adapter beside it, laid out as the launcher's `Weight`.
struct Weight {
    const uint8_t* packed;
    Absmax absmax;
    const void* bias;     // [N] or null
    const void* lora_a;   // [rank, K], fp32 or as x
    const void* lora_b;   // [N, rank]
    const float* factors; // [rows of x, rank], null where scaling is all
    float scaling;
    int rank, column; // 0 without an adapter; the first of its hidden values among the phase's
};

// One product and where it goes. Rows 0..7 of a panel come from the first weight, 8..15 from the second: of one weight
// a panel is 16 rows, of a gate and an up projection it is 8 of each.
struct Part {
    Weight halves[2];
    void* out;
    int N, first_panel;
};

// Products of one x.
struct Phase {
    Part parts[MAX_PARTS]; // those that are not there begin past the last panel
    const void* x;         // [rows of x, K]
    const void* norm;      // [K]: x is to be normed; null: it is taken as it is
    const void* residual;  // [rows of x, N], added to the one part; or null
    void* hidden;          // [rows of x, ranks], of the adapters
    int K, slice;          // blocks of a slice of K
    int share, rest;       // panels of each CTA, and one more for so many
    int ranks;
    float eps;
    bool gated; // parts are pairs of gate and up
};

template <int PHASES>
struct Chain {
    Phase phases[PHASES];
    int count;
    // [1 + MAX_PHASES] zeros, and zeros again at the end: CTAs that have made their share of the outputs so far, and
    // of each phase's hidden values. Null where no CTA needs another.
    uint32_t* arrived;
};

#if __CUDA_ARCH__ >= 900

constexpr int SHARED_BYTES = 170752;
constexpr int STAGES = 2;
constexpr int SUM_BUFFERS = 2;
constexpr int PANEL = 16; // rows of W of one mma
constexpr int HALF = PANEL / 2;
constexpr int TILE = 8; // rows of x of one mma
constexpr int QUAD = 4; // blocks of a slice that one warp multiplies
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
    float share[TILE][SUM_ROW];     // of the adapter in the panel that is being finished
    float terms[WARPS][TILE];       // of a sum over all of K
    float roots[TILE];              // 1 / the root mean square of the rows of x
    Barrier full[STAGES], empty[STAGES], summed[SUM_BUFFERS], taken[SUM_BUFFERS];
    Barrier ready[MAX_PHASES]; // the input of a phase
};

// One panel of one slice of K.
struct Item {
    int index, phase, panel, block, blocks; // blocks [block, block + blocks) of each row
    int place;                              // of the panel in its group
    bool is_first, is_last;                 // slice

    __device__ int stage() const { return index % STAGES; }
    __device__ int stage_parity() const { return index / STAGES % 2; }
    __device__ int buffer() const { return index % SUM_BUFFERS; }
    __device__ int buffer_parity() const { return index / SUM_BUFFERS % 2; }
};

// The CTA's share of a phase: panels [first, last); blocks of a row, of a slice.
struct Walk {
    int first, last, blocks, slice;

    __device__ explicit Walk(const Phase& phase) : blocks(phase.K / 64), slice(phase.slice) {
        first = blockIdx.x * phase.share + min(int(blockIdx.x), phase.rest);
        last = first + phase.share + (int(blockIdx.x) < phase.rest);
    }

    // `job(block, blocks)` for each slice.
    template <typename Job>
    __device__ void each_slice(Job&& job) const {
#pragma unroll 1
        for (int block = 0; block < blocks; block += slice)
            job(block, min(slice, blocks - block));
    }
};

// The order in which every warp goes through the CTA's items.
template <int PHASES, typename Job>
__device__ void each_item(const Chain<PHASES>& chain, Job&& job) {
    int index = 0;
#pragma unroll 1
    for (int p = 0; p < (PHASES == 1 ? 1 : chain.count); ++p) {
        const Walk walk(chain.phases[p]);
        job.begin_phase(p, walk);
#pragma unroll 1
        for (int group = walk.first; group < walk.last; group += GROUP)
            walk.each_slice([&](int block, int blocks) {
                job.begin_slice(block, blocks);
#pragma unroll 1
                for (int panel = group; panel < min(group + GROUP, walk.last); ++panel, ++index)
                    job.run({index, p, panel, block, blocks, panel - group, block == 0, block + blocks == walk.blocks});
            });
        job.end_phase(p);
    }
}

__device__ inline const Part& part_of(const Phase& phase, int panel) {
    int i = 0;
    while (i + 1 < MAX_PARTS && panel >= phase.parts[i + 1].first_panel)
        ++i;
    return phase.parts[i];
}

// The row of its weight that row `r` of a panel is.
template <int PHASES>
__device__ int row_of(const Phase& phase, const Part& part, int panel, int r) {
    const bool gated = PHASES > 1 && phase.gated;
    return (panel - part.first_panel) * (gated ? HALF : PANEL) + (gated ? r % HALF : r);
}

// The weight whose adapter has the phase's hidden value `r`.
__device__ inline const Weight& adapter_of(const Phase& phase, int r) {
    int i = 0;
    while (i + 1 < 2 * MAX_PARTS) {
        const Weight& weight = phase.parts[i / 2].halves[i % 2];
        if (r >= weight.column && r < weight.column + weight.rank)
            break;
        ++i;
    }
    return phase.parts[i / 2].halves[i % 2];
}

template <typename T, typename A, int PHASES>
struct Copy {
    Shared& shared;
    const Chain<PHASES>& chain;

    __device__ void begin_phase(int p, const Walk&) const {
        if constexpr (PHASES > 1)
            prefetch_small(chain.phases[p]);
    }
    __device__ void begin_slice(int, int) const {}
    __device__ void end_phase(int) const {}

    // Rows past the last repeat it.
    __device__ void run(const Item& item) const {
        Barrier& full = shared.full[item.stage()];
        shared.empty[item.stage()].wait(item.stage_parity() ^ 1);
        const Phase& phase = chain.phases[item.phase];
        const Part& part = part_of(phase, item.panel);
        const int64_t row_bytes = phase.K / 2;
        const int bytes = item.blocks * 32;
        const bool leader = lane_id() == 0;
        if (leader)
            full.arrive_expecting(PANEL * bytes);
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t* from = part.halves[half].packed + item.block * 32;
            const int row = row_of<PHASES>(phase, part, item.panel, half * HALF), last = part.N - 1;
#pragma unroll
            for (int r = 0; r < HALF; ++r)
                copy_bulk(shared.codes[item.stage()][half * HALF + r], from + min(row + r, last) * row_bytes, bytes,
                          full, leader);
            if constexpr (PHASES > 1)
                if (item.is_first)
                    prefetch<A>(part.halves[half].lora_b, int64_t(row) * part.halves[half].rank,
                                int64_t(min(row + HALF, part.N)) * part.halves[half].rank, lane_id(), 32);
        }
    }

    // What the other warps will wait for: this CTA's share of the norm's weight, and its rows of A.
    __device__ void prefetch_small(const Phase& phase) const {
        if (phase.norm != nullptr)
            prefetch<T>(phase.norm, 0, phase.K, blockIdx.x * 32 + lane_id(), gridDim.x * 32);
        for (int r = blockIdx.x; r < phase.ranks; r += gridDim.x) {
            const Weight& weight = adapter_of(phase, r);
            const int64_t row = r - weight.column;
            prefetch<A>(weight.lora_a, row * phase.K, (row + 1) * phase.K, lane_id(), 32);
        }
    }

    // Elements [first, end), every `lanes`-th line of them.
    template <typename E>
    __device__ static void prefetch(const void* from, int64_t first, int64_t end, int lane, int lanes) {
        constexpr int LINE = 128 / sizeof(E);
        for (int64_t at = first + lane * LINE; at < end; at += lanes * LINE)
            prefetch_l2(static_cast<const E*>(from) + at);
    }
};

// Each of the warps takes every SCALERS-th item, so that the loads of one are under way while another is decoded.
template <int PHASES>
struct DecodeScales {
    Shared& shared;
    const Chain<PHASES>& chain;
    const Table& table;
    int turn;

    static constexpr int QUADS = SLICE / QUAD, ROWS = 32 / QUADS, LOADS = PANEL / ROWS;

    __device__ void begin_phase(int, const Walk&) const {}
    __device__ void begin_slice(int, int) const {}
    __device__ void end_phase(int) const {}

    __device__ void run(const Item& item) const {
        if (item.index % SCALERS != turn)
            return;
        const Phase& phase = chain.phases[item.phase];
        const Part& part = part_of(phase, item.panel);
        const uint32_t row_blocks = phase.K / 64;
        const int block = item.block + min(lane_id() % QUADS * QUAD, item.blocks - QUAD);
        uint32_t codes[LOADS];
        float nested[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const Absmax& absmax = part.halves[i * ROWS / HALF].absmax;
            const int row = row_of<PHASES>(phase, part, item.panel, i * ROWS) + lane_id() / QUADS;
            const uint32_t at = uint32_t(min(row, part.N - 1)) * row_blocks + block;
            codes[i] = __ldg(reinterpret_cast<const uint32_t*>(absmax.codes + at));
            nested[i] = __ldg(absmax.absmax + at / 256);
        }
        shared.empty[item.stage()].wait(item.stage_parity() ^ 1);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const float offset = part.halves[i * ROWS / HALF].absmax.offset;
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

// What another CTA may have written in this launch.
__device__ inline uint4 load_written(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// The result of an mma, for rows of x that are there.
__device__ inline void store_sums(float (&sums)[TILE][SUM_ROW], const float (&total)[4], int rows_x) {
    const int g = lane_id() / 4, m = lane_id() % 4 * 2;
    if (m < rows_x)
        sums[m][g] = total[0], sums[m][g + 8] = total[2];
    if (m + 1 < rows_x)
        sums[m + 1][g] = total[1], sums[m + 1][g + 8] = total[3];
}

template <typename T, typename A, int PHASES>
struct Multiply {
    Shared& shared;
    const Chain<PHASES>& chain;
    const Table& table;
    int warp, rows_x;
    uint4 (&fragments)[QUAD][2];
    int phase = 0;

    __device__ void begin_phase(int p, const Walk& walk) {
        if (p == 0)
            wait_for_previous_kernel();
        else
            shared.ready[p].wait(0);
        phase = p;
        if constexpr (PHASES > 1) {
            if (chain.phases[p].norm != nullptr)
                find_roots(walk);
            if (int(blockIdx.x) < chain.phases[p].ranks)
                make_hidden(walk);
        }
    }

    __device__ void end_phase(int) const {}

    // Elements in the order in which the bytes of W feed the contraction; zeros where x has no row.
    __device__ void begin_slice(int block, int blocks) const {
        load_slice(block, blocks);
        if constexpr (PHASES > 1)
            if (chain.phases[phase].norm != nullptr && warp * QUAD < blocks)
                norm_slice(block);
    }

    __device__ void load_slice(int block, int blocks) const {
        const int g = lane_id() / 4, K = chain.phases[phase].K;
        const T* x = static_cast<const T*>(chain.phases[phase].x) + int64_t(blockIdx.y * TILE + g) * K;
        const uint4* from = reinterpret_cast<const uint4*>(x + column(block, 0, 0));
        const bool loads = g < rows_x && warp * QUAD < blocks;
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                fragments[j][i] = loads ? load_written(from + j * 8 + i) : make_uint4(0, 0, 0, 0);
    }

    // fragments[j][i] is the eight elements from here on.
    __device__ int column(int block, int j, int i) const {
        return (block + warp * QUAD + j) * 64 + lane_id() % 4 * 16 + i * 8;
    }

    // As rms_norm rounds.
    __device__ void norm_slice(int block) const {
        const float root = shared.roots[lane_id() / 4];
        const T* norm = static_cast<const T*>(chain.phases[phase].norm) + column(block, 0, 0);
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float v[8], w[8];
                load8(norm + j * 64 + i * 8, w);
                Raw8<T> raw{fragments[j][i]};
                raw.unpack(v);
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    v[e] = rounded<T>(v[e] * root) * w[e];
                raw.pack(v);
                fragments[j][i] = raw.words;
            }
    }

    __device__ void find_roots(const Walk& walk) const {
        float squares = 0;
        walk.each_slice([&](int block, int blocks) {
            load_slice(block, blocks);
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    squares = dot8(squares, fragments[j][i], fragments[j][i]);
        });
        const float mean = sum_of_row(squares) / float(chain.phases[phase].K);
        if (warp == 0 && lane_id() % 4 == 0)
            shared.roots[lane_id() / 4] = __fdiv_rn(1.0f, __fsqrt_rn(mean + chain.phases[phase].eps));
        meet();
    }

    // sum + the products of eight values each.
    __device__ static float dot8(float sum, uint4 a, uint4 b) {
        float v[8], w[8];
        Raw8<T>{a}.unpack(v), Raw8<T>{b}.unpack(w);
#pragma unroll
        for (int e = 0; e < 8; ++e)
            sum = fmaf(v[e], w[e], sum);
        return sum;
    }

    // The sum of what all lanes that share this lane's row have.
    __device__ float sum_of_row(float term) const {
        const int g = lane_id() / 4;
        term += __shfl_xor_sync(~0u, term, 1);
        term += __shfl_xor_sync(~0u, term, 2);
        if (lane_id() % 4 == 0)
            shared.terms[warp][g] = term;
        meet();
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w)
            sum += shared.terms[w][g];
        meet();
        return sum;
    }

    __device__ static void meet() { asm volatile("bar.sync 2, %0;" ::"n"(32 * WARPS) : "memory"); }

    // This CTA's rows of the adapters' A, rounded as a linear layer and the scaling behind it round.
    __device__ void make_hidden(const Walk& walk) {
        const Phase& now = chain.phases[phase];
        const int g = lane_id() / 4;
        for (int r = blockIdx.x; r < now.ranks; r += gridDim.x) {
            const Weight& weight = adapter_of(now, r);
            const int row = r - weight.column;
            float dot = 0;
            walk.each_slice([&](int block, int blocks) {
                begin_slice(block, blocks);
                if (warp * QUAD < blocks)
                    dot = add_products(
                        dot, static_cast<const A*>(weight.lora_a) + int64_t(row) * now.K + column(block, 0, 0));
            });
            dot = rounded<T>(sum_of_row(dot));
            if (warp == 0 && lane_id() % 4 == 0 && g < rows_x) {
                const float factor = weight.factors == nullptr ? weight.scaling : weight.factors[g * weight.rank + row];
                static_cast<T*>(now.hidden)[g * now.ranks + r] = narrow<T>(dot * factor);
            }
        }
        __syncwarp();
        if (warp == 0 && lane_id() == 0) {
            __threadfence();
            atomicAdd(&chain.arrived[1 + phase], 1);
        }
    }

    // A's elements rounded to x's dtype, as the layer uses them.
    __device__ float add_products(float dot, const A* lora_a) const {
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float a[8];
                load8(lora_a + j * 64 + i * 8, a);
                Raw8<T> rounded;
                rounded.pack(a);
                dot = dot8(dot, fragments[j][i], rounded.words);
            }
        return dot;
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
        store_sums(shared.sums[item.buffer()][warp], total, rows_x);
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
};

// Adds the warps' sums in ascending order of K, and those of the slices. A lane has four rows of W and one of x.
template <typename T, typename A, int PHASES>
struct Finish {
    Shared& shared;
    const Chain<PHASES>& chain;
    int first_row, rows_x;
    float factor;
    bool knows_hidden = false;

    __device__ void begin_phase(int p, const Walk&) {
        if (p == 0)
            wait_for_previous_kernel();
        knows_hidden = false;
    }
    __device__ void begin_slice(int, int) const {}

    __device__ void run(const Item& item) {
        const Phase& phase = chain.phases[item.phase];
        const Part& part = part_of(phase, item.panel);
        const int m = lane_id() / 4, r = lane_id() % 4 * 4;
        const int n = row_of<PHASES>(phase, part, item.panel, r);
        float residual[4] = {};
        if constexpr (PHASES > 1)
            if (item.is_last) {
                if (phase.residual != nullptr)
                    load4(phase.residual, part.N, m, n, residual);
                if (phase.ranks > 0)
                    share_of_adapter(item, phase, part);
            }
        shared.summed[item.buffer()].wait(item.buffer_parity());
        const float4 sum = add(item, m, r);
        if (item.is_last) {
            float v[4] = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
            if constexpr (PHASES > 1)
                finish(phase, part, m, r, n, residual, v);
            if (!(PHASES > 1 && phase.gated && r >= HALF))
                store4(part, m, n, v);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.taken[item.buffer()].arrive();
    }

    // Nobody waits for the last phase; who comes last leaves zeros.
    __device__ void end_phase(int p) const {
        if constexpr (PHASES > 1) {
            __syncwarp();
            if (lane_id() == 0 && chain.arrived != nullptr) {
                __threadfence();
                const uint32_t expected = (p + 1) * gridDim.x;
                const bool comes_last = atomicAdd(chain.arrived, 1) + 1 == expected;
                if (p + 1 < chain.count) {
                    wait_for(chain.arrived, expected);
                    shared.ready[p + 1].arrive();
                } else if (comes_last) {
                    for (int i = 0; i <= MAX_PHASES; ++i)
                        chain.arrived[i] = 0;
                }
            }
            __syncwarp();
        }
    }

    __device__ static void wait_for(const uint32_t* count, uint32_t expected) {
        uint32_t seen;
        do
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
        while (seen < expected);
    }

    // Sums of rows of x that are not there are never used.
    __device__ float4 add(const Item& item, int m, int r) const {
        float4& kept = *reinterpret_cast<float4*>(&shared.kept[item.place][m][r]);
        float4 sum = item.is_first ? make_float4(0, 0, 0, 0) : kept;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp)
            if (warp * QUAD < item.blocks && m < rows_x) {
                const float4 v = *reinterpret_cast<const float4*>(&shared.sums[item.buffer()][warp][m][r]);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
        if (!item.is_last)
            kept = sum;
        return sum;
    }

    // B times the hidden values, on the tensor cores, into shared memory.
    __device__ void share_of_adapter(const Item& item, const Phase& phase, const Part& part) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        if (!knows_hidden) {
            if (lane_id() == 0)
                wait_for(&chain.arrived[1 + item.phase], min(phase.ranks, int(gridDim.x)));
            __syncwarp();
            knows_hidden = true;
        }
        float total[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Weight& weight = part.halves[half];
            const int rank = weight.rank;
            const int64_t row = min(row_of<PHASES>(phase, part, item.panel, half * HALF) + g, part.N - 1);
            const A* lora_b = static_cast<const A*>(weight.lora_b) + row * rank;
            const T* hidden = static_cast<const T*>(phase.hidden) + g * phase.ranks + weight.column;
            for (int k = 2 * t; k < rank + 2 * t; k += 16) {
                uint32_t a[4] = {};
                a[half] = pair_of_b(lora_b, k, rank);
                a[half + 2] = pair_of_b(lora_b, k + 8, rank);
                const int end = g < rows_x ? rank : 0;
                multiply_add(T{}, total, a, pair(hidden, k, end), pair(hidden, k + 8, end));
            }
        }
        store_sums(shared.share, total, rows_x);
        __syncwarp();
    }

    // Elements k and k + 1 of what ends at `end`, then zeros.
    __device__ static uint32_t pair(const T* from, int k, int end) {
        const uint32_t low = k < end ? from[k].bits : 0, high = k + 1 < end ? from[k + 1].bits : 0;
        return low | high << 16;
    }

    // Rounded to x's dtype, as the layer uses them.
    __device__ static uint32_t pair_of_b(const A* row, int k, int rank) {
        return narrow2<T>(k < rank ? widen(row[k]) : 0.0f, k + 1 < rank ? widen(row[k + 1]) : 0.0f);
    }

    // The product gets its bias, its adapter's share, its gate and the stream it joins.
    __device__ void finish(const Phase& phase, const Part& part, int m, int r, int n, const float (&residual)[4],
                           float (&v)[4]) const {
        const bool second = r >= HALF;
        const void* bias = second ? part.halves[1].bias : part.halves[0].bias;
        const bool adapted = (second ? part.halves[1].rank : part.halves[0].rank) > 0;
        if (bias != nullptr) {
            float b[4];
            load4(bias, 0, m, n, b, part.N);
            add4(v, b);
        }
        if (adapted && m < rows_x) {
            const float4 s = *reinterpret_cast<const float4*>(&shared.share[m][r]);
            add4(v, {s.x, s.y, s.z, s.w});
        }
        if (phase.gated) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float gate = rounded<T>(v[i]), up = __shfl_xor_sync(~0u, gate, 2);
                v[i] = rounded<T>(gate * sigmoid<T>(gate)) * up;
            }
        }
        if (phase.residual != nullptr)
            add4(v, residual);
    }

    __device__ static void add4(float (&v)[4], const float (&more)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[i] = rounded<T>(v[i]) + more[i];
    }

    __device__ void load4(const void* from, int pitch, int m, int n, float (&v)[4], int end) const {
        const T* row = static_cast<const T*>(from) + int64_t(m) * pitch;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[i] = m < rows_x && n + i < end ? widen(row[n + i]) : 0.0f;
    }
    __device__ void load4(const void* from, int pitch, int m, int n, float (&v)[4]) const {
        load4(from, pitch, m, n, v, pitch);
    }

    __device__ void store4(const Part& part, int m, int n, const float (&v)[4]) const {
        T* out = static_cast<T*>(part.out) + int64_t(first_row + m) * part.N;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (m < rows_x && n + i < part.N)
                out[n + i] = narrow<T>(v[i]);
    }
};

__device__ inline void init_barriers(Shared& shared) {
    for (int i = 0; i < STAGES; ++i)
        shared.full[i].init(2), shared.empty[i].init(WARPS);
    for (int i = 0; i < SUM_BUFFERS; ++i)
        shared.summed[i].init(WARPS), shared.taken[i].init(1);
    for (int i = 0; i < MAX_PHASES; ++i)
        shared.ready[i].init(1);
    Barrier::publish();
}

template <typename T, typename A, int PHASES>
__device__ void gemv_bulk(const Chain<PHASES>& chain, int rows_x, const Codebook& codebook, float gain) {
    extern __shared__ uint4 dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    let_next_kernel_start();
    const int warp = threadIdx.x / 32;

    if (warp == WARPS) {
        if (lane_id() == 0)
            init_barriers(shared);
        __syncwarp();
        asm volatile("bar.arrive 1, %0;" ::"n"(32 * ALL_WARPS) : "memory");
        each_item(chain, Copy<T, A, PHASES>{shared, chain});
        return;
    }
    if (warp < WARPS) {
        const float entry = codebook.values[lane_id() % 16] * gain;
        const float* map = chain.phases[0].parts[0].halves[0].absmax.map;
        fill_table(shared.table, 0, 32 * WARPS,
                   [&](int b) { return narrow2<T>(lookup16(entry, b >> 4), lookup16(entry, b)); });
        fill_table(shared.table, 1, 32 * WARPS, [&](int b) { return __float_as_uint(__ldg(map + b)); });
    }
    asm volatile("bar.sync 1, %0;" ::"n"(32 * ALL_WARPS) : "memory");

    const Table table = Table::first(dynamic);
    const int first_row = blockIdx.y * TILE;
    rows_x = min(rows_x - first_row, TILE);
    if (warp < WARPS) {
        uint4 fragments[QUAD][2];
        each_item(chain, Multiply<T, A, PHASES>{shared, chain, table, warp, rows_x, fragments});
    } else if (warp <= WARPS + SCALERS) {
        each_item(chain, DecodeScales<PHASES>{shared, chain, table, warp - WARPS - 1});
    } else {
        each_item(chain, Finish<T, A, PHASES>{shared, chain, first_row, rows_x, 1.0f / gain});
    }
}

static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for so much");

#else

template <typename T, typename A, int PHASES>
__device__ void gemv_bulk(const Chain<PHASES>&, int, const Codebook&, float) {}

#endif

// x and packed 16-byte aligned, nested absmax with one map for all and codes 4-byte aligned, blocks of 64,
// K % 256 == 0, every N * K < 2^38; panels: of all parts; unused parts begin past them; grid (any, tiles of x).
#define GEMV_4BIT_BULK(T, dtype)                                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * ALL_WARPS, 1)                                                    \
        gemv_4bit_bulk_##dtype(const __grid_constant__ Chain<1> chain, int rows_x,                                     \
                               const __grid_constant__ Codebook codebook, float gain) {                                \
        gemv_bulk<T, T>(chain, rows_x, codebook, gain);                                                                   \
    }

// The same, and: at most TILE rows of x, A and the norms' weights 16-byte aligned; the whole grid runs at once.
#define GEMV_4BIT_CHAIN(T, dtype, A, adapter_dtype)                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * ALL_WARPS, 1)                                                    \
        gemv_4bit_chain_##dtype##_##adapter_dtype(const __grid_constant__ Chain<MAX_PHASES> chain, int rows_x,         \
                                                  const __grid_constant__ Codebook codebook, float gain) {             \
        gemv_bulk<T, A>(chain, rows_x, codebook, gain);                                                                \
    }

GEMV_4BIT_BULK(f16, f16)
GEMV_4BIT_BULK(bf16, bf16)
GEMV_4BIT_CHAIN(f16, f16, float, f32)
GEMV_4BIT_CHAIN(f16, f16, f16, f16)
GEMV_4BIT_CHAIN(bf16, bf16, float, f32)
GEMV_4BIT_CHAIN(bf16, bf16, bf16, bf16)
