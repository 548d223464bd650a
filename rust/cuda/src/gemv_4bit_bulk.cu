// The product of gemv_4bit for x of 16 bits where bulk copies exist: W streams through a ring in shared memory.
//
// As in gemv_4bit_mma, W is operand A of mma.m16n8k16, bytes become pairs of values in a table, and scales enter the
// fp32 sums. But here every warp has one job, and barriers in shared memory are all that connects them: one warp
// copies codes, one decodes scales, sixteen multiply, one adds up what they made, and in a chain one multiplies by the
// adapters' B. So memory is read without a pause while the table, which is what bounds the kernel, is never without
// work.
//
// A warp that multiplies keeps its part of x in registers: four blocks of 64 of a slice of K. The CTA takes its panels
// of 16 rows of W one after the other, and for a long K some panels together, slice by slice. The order of every sum
// follows from K alone; thus a row of out depends neither on the other rows of x nor on the number of CTAs.
//
// A chain is several such products in one launch, each of what the one before has made: the CTAs meet between them,
// and while they wait the ring fills with the next weights. There x may be normed as it is read, and what is summed up
// may get a bias, an adapter's share, go through SwiGLU and join the residual stream, each rounded as the operation of
// that name rounds it.
#include "chain.cuh"
#include "codes.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "pipeline.cuh"
#include "sigmoid.cuh"

constexpr int WARPS = 16; // that multiply
constexpr int ALL_WARPS = WARPS + 4;

struct Codebook {
    float values[16];
};

#if __CUDA_ARCH__ >= 900

constexpr int SHARED_BYTES = 177504;
constexpr int TILE = 8; // rows of x of one mma
constexpr int QUAD = 4; // blocks of a slice that one warp multiplies
constexpr int SLICE = WARPS * QUAD;
// Eight rows of 32 bytes lie in different banks.
constexpr int ROW_BYTES = SLICE * 32 + 32;
constexpr int SCALE_ROW = SLICE + 4;
constexpr int SUM_ROW = PANEL + 4;

struct Shared {
    uint4 table[TABLE / 16];
    uint8_t codes[STAGES][PANEL][ROW_BYTES];
    float scales[STAGES][PANEL][SCALE_ROW];
    float sums[SUM_BUFFERS][WARPS][TILE][SUM_ROW];
    float kept[GROUP][TILE][PANEL];                                           // of the slices so far
    float share[SUM_BUFFERS][TILE][SUM_ROW];                                  // of the adapter in the sums
    float squares[MAX_PHASES][WARPS][TILE], dots[MAX_PHASES][2][WARPS][TILE]; // of the rows of x, by warp
    float roots[WARPS][TILE];                                                 // 1 / their root mean square
    Barrier full[STAGES], empty[STAGES], summed[SUM_BUFFERS], taken[SUM_BUFFERS];
    Barrier ready[MAX_PHASES]; // the input of a phase
};

template <typename T, typename A, int PHASES>
struct Copy {
    Shared& shared;
    const Chain<PHASES>& chain;
    Place place;
    const uint8_t* packed[2];
    const A* lora_b[2];
    int rank[2];

    __device__ void begin_phase(int p, const Walk&) const {
        if constexpr (PHASES > 1)
            prefetch_small(chain.phases[p]);
    }
    __device__ void begin_slice(int, int, int) const {}
    __device__ void end_phase(int) const {}

    // Rows past the last repeat it.
    __device__ void run(const Item& item) {
        if (place.moves(chain, item))
            for (int half = 0; half < 2; ++half) {
                const Weight& weight = chain.phases[place.phase].parts[place.part].halves[half];
                packed[half] = weight.packed;
                lora_b[half] = static_cast<const A*>(weight.lora_b), rank[half] = weight.rank;
            }
        Barrier& full = shared.full[item.stage()];
        shared.empty[item.stage()].wait(item.stage_parity() ^ 1);
        const int64_t row_bytes = place.row_blocks * 32;
        const int bytes = item.blocks * 32;
        const bool leader = lane_id() == 0;
        if (leader)
            full.arrive_expecting(PANEL * bytes);
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t* from = packed[half] + item.block * 32;
            const int row = place.row(item.panel, half * HALF), last = place.N - 1;
#pragma unroll
            for (int r = 0; r < HALF; ++r)
                copy_bulk(shared.codes[item.stage()][half * HALF + r], from + min(row + r, last) * row_bytes, bytes,
                          full, leader);
            if constexpr (PHASES > 1)
                if (item.is_first)
                    prefetch<A>(lora_b[half], int64_t(row) * rank[half], int64_t(min(row + HALF, place.N)) * rank[half],
                                lane_id(), 32);
        }
    }

    // What the other warps will wait for: this CTA's share of the norm's weight, and its rows of A. B's follow item by
    // item.
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

// The scales of an item are on their way while those of the one before are decoded.
template <int PHASES>
struct DecodeScales {
    Shared& shared;
    const Chain<PHASES>& chain;
    const Table& table;
    Place place;
    const uint8_t* codes[2];
    const float* nested[2];
    float offset[2];

    static constexpr int QUADS = SLICE / QUAD, ROWS = 32 / QUADS, LOADS = PANEL / ROWS;

    struct Raw {
        int index = -1;
        uint32_t codes[LOADS];
        float nested[LOADS], offset[2];
    } waiting;

    __device__ void begin_phase(int, const Walk&) const {}
    __device__ void begin_slice(int, int, int) const {}
    __device__ void end_phase(int p) const {
        if (PHASES == 1 || p + 1 == chain.count)
            decode(waiting);
    }

    __device__ void run(const Item& item) {
        if (place.moves(chain, item))
            for (int half = 0; half < 2; ++half) {
                const Absmax& absmax = chain.phases[place.phase].parts[place.part].halves[half].absmax;
                codes[half] = absmax.codes, nested[half] = absmax.absmax, offset[half] = absmax.offset;
            }
        const int block = item.block + min(lane_id() % QUADS * QUAD, item.blocks - QUAD);
        Raw raw;
        raw.index = item.index, raw.offset[0] = offset[0], raw.offset[1] = offset[1];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int half = i * ROWS / HALF, row = place.row(item.panel, i * ROWS) + lane_id() / QUADS;
            const uint32_t at = uint32_t(min(row, place.N - 1)) * place.row_blocks + block;
            raw.codes[i] = __ldg(reinterpret_cast<const uint32_t*>(codes[half] + at));
            raw.nested[i] = __ldg(nested[half] + at / 256);
        }
        decode(waiting);
        waiting = raw;
    }

    __device__ void decode(const Raw& raw) const {
        if (raw.index < 0)
            return;
        const int stage = raw.index % STAGES;
        shared.empty[stage].wait(raw.index / STAGES % 2 ^ 1);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            float v[QUAD];
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
                v[j] = __fadd_rn(__fmul_rn(table.scale(raw.codes[i], j), raw.nested[i]), raw.offset[i * ROWS / HALF]);
            store16(&shared.scales[stage][i * ROWS + lane_id() / QUADS][lane_id() % QUADS * QUAD], v);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.full[stage].arrive();
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
    int warp;
    uint4 (&fragments)[QUAD][2];

    __device__ void begin_phase(int p, const Walk& walk) const {
        const bool norms = PHASES > 1 && chain.phases[p].norm != nullptr;
        if (p == 0)
            wait_for_previous_kernel();
        else
            shared.ready[p].wait(0);
        if constexpr (PHASES > 1) {
            if (fits(walk))
                load_slice(p, 0, walk.blocks);
            if (norms)
                find_root(p, walk);
            if (norms && fits(walk))
                norm_slice(p, 0);
            if (int(blockIdx.x) < chain.phases[p].ranks)
                make_hidden(p, walk);
        }
    }

    // Whether x is one slice, which then stays from the beginning of the phase to its end.
    __device__ static bool fits(const Walk& walk) { return walk.blocks <= walk.slice; }

    __device__ void end_phase(int) const {}

    // Elements in the order in which the bytes of W feed the contraction; zeros where x has no row.
    __device__ void begin_slice(int p, int block, int blocks) const {
        if (PHASES > 1 && blocks == chain.phases[p].K / 64)
            return;
        load_slice(p, block, blocks);
        if constexpr (PHASES > 1)
            if (chain.phases[p].norm != nullptr)
                norm_slice(p, block);
    }

    __device__ void load_slice(int p, int block, int blocks) const {
        const int g = lane_id() / 4, K = chain.phases[p].K;
        const T* x = static_cast<const T*>(chain.phases[p].x) + int64_t(blockIdx.y * TILE + g) * K;
        const uint4* from = reinterpret_cast<const uint4*>(x + column(block, 0, 0));
        const bool loads = g < chain.rows_x - int(blockIdx.y) * TILE && warp * QUAD < blocks;
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

    // As rms_norm rounds; past the end zeros stay zeros.
    __device__ void norm_slice(int p, int block) const {
        const int at = column(block, 0, 0);
        const T* norm = static_cast<const T*>(chain.phases[p].norm) + (at < chain.phases[p].K ? at : 0);
        const float root = shared.roots[warp][lane_id() / 4];
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 w = __ldg(reinterpret_cast<const uint4*>(norm + j * 64 + i * 8));
                uint4& x = fragments[j][i];
                x.x = norm_pair(x.x, root, w.x), x.y = norm_pair(x.y, root, w.y);
                x.z = norm_pair(x.z, root, w.z), x.w = norm_pair(x.w, root, w.w);
            }
    }

    __device__ static uint32_t norm_pair(uint32_t x, float root, uint32_t weight) {
        return multiply2<T>(narrow2<T>(low<T>(x) * root, high<T>(x) * root), weight);
    }

    // Each warp finds it for itself.
    __device__ void find_root(int p, const Walk& walk) const {
        float squares = 0;
        walk.each_slice([&](int block, int blocks) {
            if (!fits(walk))
                load_slice(p, block, blocks);
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    squares = dot8(squares, fragments[j][i], fragments[j][i]);
        });
        const float mean = sum_of_row(squares, shared.squares[p]) / float(chain.phases[p].K);
        shared.roots[warp][lane_id() / 4] = rsqrtf(mean + chain.phases[p].eps);
        __syncwarp();
    }

    // sum + the products of eight values each.
    __device__ static float dot8(float sum, uint4 a, uint4 b) {
        const uint32_t pairs[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum = fmaf(low<T>(pairs[0][i]), low<T>(pairs[1][i]), sum);
            sum = fmaf(high<T>(pairs[0][i]), high<T>(pairs[1][i]), sum);
        }
        return sum;
    }

    // The sum of what all lanes that share this lane's row have, by way of `terms`, where nobody may write again before
    // everybody has met once more.
    __device__ float sum_of_row(float term, float (&terms)[WARPS][TILE]) const {
        const int g = lane_id() / 4;
        term += __shfl_xor_sync(~0u, term, 1);
        term += __shfl_xor_sync(~0u, term, 2);
        if (lane_id() % 4 == 0)
            terms[warp][g] = term;
        asm volatile("bar.sync 2, %0;" ::"n"(32 * WARPS) : "memory");
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w)
            sum += terms[w][g];
        return sum;
    }

    // This CTA's rows of the adapters' A, rounded as a linear layer and the scaling behind it round.
    __device__ void make_hidden(int p, const Walk& walk) const {
        const Phase& now = chain.phases[p];
        const int g = lane_id() / 4;
        for (int r = blockIdx.x, turn = 0; r < now.ranks; r += gridDim.x, turn ^= 1) {
            const Weight& weight = adapter_of(now, r);
            const int row = r - weight.column;
            float dot = 0;
            walk.each_slice([&](int block, int blocks) {
                begin_slice(p, block, blocks);
                if (warp * QUAD < blocks)
                    dot = add_products(dot, static_cast<const A*>(weight.lora_a) + int64_t(row) * now.K +
                                                column(block, 0, 0));
            });
            dot = rounded<T>(sum_of_row(dot, shared.dots[p][turn]));
            if (warp == 0 && lane_id() % 4 == 0 && g < chain.rows_x) {
                const float factor = weight.factors == nullptr ? weight.scaling : weight.factors[g * weight.rank + row];
                static_cast<T*>(now.hidden)[g * now.ranks + r] = narrow<T>(dot * factor);
            }
        }
        __syncwarp();
        if (warp == 0 && lane_id() == 0)
            arrive(&chain.arrived[1 + p]);
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
        store_sums(shared.sums[item.buffer()][warp], total, chain.rows_x - int(blockIdx.y) * TILE);
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

// Multiplies the adapters' hidden values by B on the tensor cores, a panel at a time, beside the warps that multiply
// codes; it arrives for every item as they do.
template <typename T, typename A, int PHASES>
struct Adapt {
    Shared& shared;
    const Chain<PHASES>& chain;
    int rows_x;
    Place place;
    const A* lora_b[2];
    const T* hidden[2]; // this lane's row
    int ranks_of[2], ranks;
    bool knows_hidden = false;

    __device__ void begin_phase(int p, const Walk&) {
        if (p == 0)
            wait_for_previous_kernel();
        ranks = chain.phases[p].ranks;
        knows_hidden = false;
    }
    __device__ void begin_slice(int, int, int) const {}
    __device__ void end_phase(int) const {}

    __device__ void run(const Item& item) {
        float total[4] = {};
        const bool works = ranks > 0 && item.is_last;
        if (works) {
            if (place.moves(chain, item))
                read_part();
            if (!knows_hidden)
                wait_for_hidden();
            for (int half = 0; half < (place.gated ? 2 : 1); ++half)
                multiply(item, half, total);
        }
        shared.taken[item.buffer()].wait(item.buffer_parity() ^ 1);
        if (works)
            store_sums(shared.share[item.buffer()], total, rows_x);
        __syncwarp();
        if (lane_id() == 0)
            shared.summed[item.buffer()].arrive();
    }

    __device__ void read_part() {
        const Phase& phase = chain.phases[place.phase];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Weight& weight = phase.parts[place.part].halves[half];
            ranks_of[half] = weight.rank;
            lora_b[half] = static_cast<const A*>(weight.lora_b);
            hidden[half] = static_cast<const T*>(phase.hidden) + min(lane_id() / 4, rows_x - 1) * ranks + weight.column;
        }
    }

    __device__ void wait_for_hidden() {
        if (lane_id() == 0)
            wait_for(&chain.arrived[1 + place.phase], min(ranks, int(gridDim.x)));
        __syncwarp();
        knows_hidden = true;
    }

    // By the hidden values of one half, which belong to both unless the halves are a gate's and an up projection's.
    __device__ void multiply(const Item& item, int half, float (&total)[4]) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
        const int rank = half ? ranks_of[1] : ranks_of[0];
        const T* values = half ? hidden[1] : hidden[0];
        const int64_t row = min(place.row(item.panel, half * HALF) + g, place.N - 1);
        const A* upper = (half ? lora_b[1] : lora_b[0]) + row * rank;
        const A* lower =
            place.gated ? upper : lora_b[0] + min(place.row(item.panel, HALF) + g, place.N - 1) * int64_t(rank);
        const int end = g < rows_x ? rank : 0; // of the hidden values
        // Four steps' loads are under way together.
        for (int first = 2 * t; first < rank + 2 * t; first += 64) {
            uint32_t a[4][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int at = first + 16 * i + 8 * k;
                    a[i][2 * k] = pair(upper, at, half == 0 ? rank : 0);
                    a[i][2 * k + 1] = pair(lower, at, half == 1 || !place.gated ? rank : 0);
                    b[i][k] = pair(values, at, end);
                }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                multiply_add(T{}, total, a[i], b[i][0], b[i][1]);
        }
    }

    // Elements k and k + 1 of a row that ends at `end`, then zeros; rounded to x's dtype, as the layer uses them.
    // Selected addresses instead of branches: the loads stay side by side.
    template <typename E>
    __device__ static uint32_t pair(const E* row, int k, int end) {
        const float low = widen(row[k < end ? k : 0]), high = widen(row[k + 1 < end ? k + 1 : 0]);
        return narrow2<T>(k < end ? low : 0.0f, k + 1 < end ? high : 0.0f);
    }
};

// Adds the warps' sums in ascending order of K, and those of the slices. A lane has four rows of W and one of x.
template <typename T, int PHASES>
struct Finish {
    Shared& shared;
    const Chain<PHASES>& chain;
    int first_row, rows_x;
    float factor;
    Place place;
    T* out;
    const T *bias, *residual;
    bool adapted;

    __device__ void begin_phase(int p, const Walk&) const {
        if (p == 0)
            wait_for_previous_kernel();
    }
    __device__ void begin_slice(int, int, int) const {}

    __device__ void run(const Item& item) {
        const int m = lane_id() / 4, r = lane_id() % 4 * 4;
        if (place.moves(chain, item))
            read_part(m, r);
        const int n = place.row(item.panel, r);
        float joined[4] = {};
        if (PHASES > 1 && item.is_last && residual != nullptr)
            load4(residual, m, n, joined);
        shared.summed[item.buffer()].wait(item.buffer_parity());
        const float4 sum = add(item, m, r);
        if (item.is_last) {
            float v[4] = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
            if constexpr (PHASES > 1)
                finish(shared.share[item.buffer()][m] + r, m, n, joined, v);
            if (!(place.gated && r >= HALF))
                store4(m, n, v);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.taken[item.buffer()].arrive();
    }

    __device__ void read_part(int m, int r) {
        const Phase& phase = chain.phases[place.phase];
        const Part& part = phase.parts[place.part];
        out = static_cast<T*>(part.out) + int64_t(first_row + m) * place.N;
        if constexpr (PHASES > 1) {
            const Weight& weight = part.halves[r / HALF];
            bias = static_cast<const T*>(weight.bias);
            adapted = weight.rank > 0;
            residual = static_cast<const T*>(phase.residual);
            if (residual != nullptr)
                residual += int64_t(m) * place.N;
        }
    }

    // Nobody waits for the last phase; who comes last leaves zeros.
    __device__ void end_phase(int p) const {
        if constexpr (PHASES > 1) {
            __syncwarp();
            if (lane_id() == 0) {
                const uint32_t expected = (p + 1) * gridDim.x;
                if (p + 1 < chain.count) {
                    arrive(chain.arrived);
                    wait_for(chain.arrived, expected);
                    shared.ready[p + 1].arrive();
                } else if (arrive_and_count(chain.arrived) + 1 == expected) {
                    for (int i = 0; i <= MAX_PHASES; ++i)
                        chain.arrived[i] = 0;
                }
            }
            __syncwarp();
        }
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

    // The product gets its bias, its adapter's share, its gate and the stream it joins.
    __device__ void finish(const float* share, int m, int n, const float (&joined)[4], float (&v)[4]) const {
        if (bias != nullptr) {
            float b[4];
            load4(bias, m, n, b);
            add4(v, b);
        }
        if (adapted && m < rows_x) {
            const float4 s = *reinterpret_cast<const float4*>(share);
            add4(v, {s.x, s.y, s.z, s.w});
        }
        if (place.gated) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float gate = rounded<T>(v[i]), up = __shfl_xor_sync(~0u, gate, 2);
                v[i] = rounded<T>(gate * sigmoid<T>(gate)) * up;
            }
        }
        if (residual != nullptr)
            add4(v, joined);
    }

    __device__ static void add4(float (&v)[4], const float (&more)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[i] = rounded<T>(v[i]) + more[i];
    }

    __device__ void load4(const T* row, int m, int n, float (&v)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[i] = m < rows_x && n + i < place.N ? widen(row[n + i]) : 0.0f;
    }

    __device__ void store4(int m, int n, const float (&v)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (m < rows_x && n + i < place.N)
                out[n + i] = narrow<T>(v[i]);
    }
};

__device__ inline void init_barriers(Shared& shared, bool adapts) {
    for (int i = 0; i < STAGES; ++i)
        shared.full[i].init(2), shared.empty[i].init(WARPS);
    for (int i = 0; i < SUM_BUFFERS; ++i)
        shared.summed[i].init(WARPS + adapts), shared.taken[i].init(1);
    for (int i = 0; i < MAX_PHASES; ++i)
        shared.ready[i].init(1);
    Barrier::publish();
}

// The table and the barriers.
__device__ inline void all_ready() { asm volatile("bar.sync 1, %0;" ::"n"(32 * ALL_WARPS) : "memory"); }

template <typename T, typename A, int PHASES>
__device__ void gemv_bulk(const Chain<PHASES>& chain, const Codebook& codebook, float gain) {
    extern __shared__ uint4 dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    let_next_kernel_start();
    constexpr bool CHAINED = PHASES > 1;
    const int warp = threadIdx.x / 32;
    const Table table = Table::first(dynamic);
    const int first_row = blockIdx.y * TILE;
    const int rows_x = min(chain.rows_x - first_row, TILE);

    if (warp < WARPS) {
        const float entry = codebook.values[lane_id() % 16] * gain;
        const float* map = chain.phases[0].parts[0].halves[0].absmax.map;
        fill_table(shared.table, 0, 32 * WARPS,
                   [&](int b) { return narrow2<T>(lookup16(entry, b >> 4), lookup16(entry, b)); });
        fill_table(shared.table, 1, 32 * WARPS, [&](int b) { return __float_as_uint(__ldg(map + b)); });
        all_ready();
        uint4 fragments[QUAD][2];
        each_item(chain, Multiply<T, A, PHASES>{shared, chain, table, warp, fragments});
        return;
    }
    if (warp == WARPS) {
        if (lane_id() == 0)
            init_barriers(shared, CHAINED);
        __syncwarp();
        asm volatile("bar.arrive 1, %0;" ::"n"(32 * ALL_WARPS) : "memory");
        each_item(chain, Copy<T, A, PHASES>{shared, chain});
        return;
    }
    all_ready();
    if (warp == WARPS + 1) {
        each_item(chain, DecodeScales<PHASES>{shared, chain, table});
    } else if (warp == WARPS + 2) {
        each_item(chain, Finish<T, PHASES>{shared, chain, first_row, rows_x, 1.0f / gain});
    } else if constexpr (CHAINED) {
        each_item(chain, Adapt<T, A, PHASES>{shared, chain, rows_x});
    }
}

static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for so much");

#else

template <typename T, typename A, int PHASES>
__device__ void gemv_bulk(const Chain<PHASES>&, const Codebook&, float) {}

#endif

// x and packed 16-byte aligned, nested absmax with one map for all and codes 4-byte aligned, blocks of 64,
// K % 256 == 0, every N * K < 2^38; panels: of all parts; unused parts begin past them; grid (any, tiles of x).
#define GEMV_4BIT_BULK(T, dtype)                                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * ALL_WARPS, 1) gemv_4bit_bulk_##dtype(                            \
        const __grid_constant__ Chain<1> chain, const __grid_constant__ Codebook codebook, float gain) {               \
        gemv_bulk<T, T>(chain, codebook, gain);                                                                        \
    }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAS_CHAINS = true;
#else
constexpr bool HAS_CHAINS = false; // where none has been timed
#endif

// The same, and: at most TILE rows of x, A and the norms' weights 16-byte aligned; the whole
// grid runs at once.
#define GEMV_4BIT_CHAIN(T, dtype, A, adapter_dtype)                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * ALL_WARPS, 1) gemv_4bit_chain_##dtype##_##adapter_dtype(         \
        const __grid_constant__ Chain<MAX_PHASES> chain, const __grid_constant__ Codebook codebook, float gain) {      \
        if constexpr (HAS_CHAINS)                                                                                      \
            gemv_bulk<T, A>(chain, codebook, gain);                                                                    \
    }

GEMV_4BIT_BULK(f16, f16)
GEMV_4BIT_BULK(bf16, bf16)
GEMV_4BIT_CHAIN(f16, f16, float, f32)
GEMV_4BIT_CHAIN(f16, f16, f16, f16)
GEMV_4BIT_CHAIN(bf16, bf16, float, f32)
GEMV_4BIT_CHAIN(bf16, bf16, bf16, bf16)
