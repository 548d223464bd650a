// The product of gemv_4bit for x of 16 bits where bulk copies exist: W streams through a ring in shared memory.
//
// As in gemv_4bit_mma, W is operand A of mma.m16n8k16, bytes become pairs of values in a table, and scales enter the
// fp32 sums. But here every warp has one job, and barriers in shared memory are all that connects them: one warp
// copies codes, one decodes scales, sixteen multiply, one multiplies by the adapters' B, one adds up what they made. So
// memory is read without a pause while the table, which is what bounds the kernel, is never without work. For nine to
// sixteen rows of x every pair of values feeds two mmas; eight warps have registers for twice the x, and two add up.
//
// A warp that multiplies keeps its part of x in registers: four blocks of 64 of a slice of K. The CTA takes its panels
// of 16 rows of W one after the other, and for a long K some panels together, slice by slice. The order of every sum
// follows from K alone; thus a row of out depends neither on the other rows of x nor on the number of CTAs.
//
// A K of 1024 or less is work for four warps: where rows of W are many, warps take panels side by side.
//
// x may still wait for its norm: the sums of squares that the launch before has left make its roots, and every CTA
// norms what it reads. What is summed up may get a bias and an adapter's share, go through SwiGLU, or be added to a
// residual, each rounded as the operation of that name rounds it. A launch of its own, in front of this one, makes the
// adapters' hidden values x A^T; it says when x is there, so that the codes are multiplied meanwhile.
//
// Between two launches memory would have nothing to do: what the next one reads first is moved to L2 by the end of this
// one.
#include "codes.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "norm.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "pipeline.cuh"
#include "products.cuh"
#include "sigmoid.cuh"

// From 12.0 on a multiprocessor has less shared memory than this takes.
#define HAS_ROOM (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)

constexpr int MMA_ROWS = 8; // of x, of one mma; no more may stand beside adapters

#if HAS_ROOM

constexpr int QUAD = 4; // blocks of a slice that one warp multiplies
constexpr int SUM_ROW = PANEL + 4;
constexpr int HIDDEN_ROW = 2 * MAX_RANK + 8;

// For TILE rows of x and SIDE panels side by side, whose rows are one slice where there are several; the order of a
// row's sums is the same for all. A launch waits for its instructions, too: so the usual forms have none for adapters,
// and read nested scales alone, four of which lie together; ANY reads all others.
template <int TILE_, int SIDE_, bool ADAPTS_, bool ANY_>
struct Shared {
    static constexpr int TILE = TILE_, SIDE = SIDE_;
    static constexpr bool ADAPTS = ADAPTS_, ANY = ANY_;
    static constexpr int WARPS = 128 / TILE;         // that multiply
    static constexpr int PANEL_WARPS = WARPS / SIDE; // one panel
    static constexpr int ALL_WARPS = WARPS + 4;
    static constexpr int STAGES = 32 / WARPS;
    static constexpr int SLICE = WARPS * QUAD;
    static constexpr int ROW_BYTES = SLICE * 32 + 32; // eight rows of 32 bytes lie in different banks
    static constexpr int SCALE_ROW = SLICE + 4;
    static constexpr int FINISHERS = TILE / MMA_ROWS;

    uint4 table[TABLE / 16];
    uint8_t codes[STAGES][PANEL][ROW_BYTES];
    float scales[STAGES][PANEL][SCALE_ROW];
    float sums[SUM_BUFFERS][WARPS][TILE][SUM_ROW];
    float kept[GROUP][TILE][PANEL];                           // of the slices so far
    float share[SUM_BUFFERS][ADAPTS ? MMA_ROWS : 1][SUM_ROW]; // of the adapter in the sums
    uint16_t hidden[ADAPTS ? MMA_ROWS : 1][HIDDEN_ROW];       // of the part's adapters
    float roots[TILE];                                        // of x, where it is normed
    Barrier full[STAGES], empty[STAGES], summed[SUM_BUFFERS], taken[SUM_BUFFERS];

    // The barriers are there, for the warp that copies; then the table, too, for all others. Warps that multiply meet
    // alone.
    __device__ static void all_ready() { asm volatile("bar.sync 1, %0;" ::"n"(32 * (ALL_WARPS - 1)) : "memory"); }
    __device__ static void multipliers_meet() { asm volatile("bar.sync 3, %0;" ::"n"(32 * WARPS) : "memory"); }
    __device__ static void barriers_ready() { asm volatile("bar.sync 2, 64;" ::: "memory"); }

    // The codes of a panel of several, whose rows lie as in W: one behind the other.
    __device__ uint8_t* panel(int stage, int side) { return codes[stage][0] + side * (sizeof(codes[0]) / SIDE); }

    using Stage = Turn<STAGES>;
    using Buffer = Turn<SUM_BUFFERS>;
};

// Moves what the next launch reads first to L2.
struct Prefetch {
    const Weights& ahead;
    Place<> place;

    __device__ void begin(const Walk&) const {}
    __device__ void begin_slice(const Walk&, int, int) const {}
    __device__ void end() const {}

    __device__ void run(const Item& item) {
        if (item.index >= ahead.early)
            return;
        place.moves(ahead, item.panel);
        if (const int r = lane_id(); r < PANEL) {
            const int64_t row = min(place.row(item.panel, r), place.N - 1);
            const int64_t block = row * place.row_blocks + item.block;
            prefetch_bulk(of_part(ahead.packed, place.part, r / HALF) + block * 32, item.blocks * 32);
            prefetch_l2(of_part(ahead.codes, place.part, r / HALF) + block);
            prefetch_l2(of_part(ahead.nested, place.part, r / HALF) + block / 256);
        }
    }
};

template <typename Shared>
struct Copy {
    Shared& shared;
    const Weights &weights, &ahead;
    Place<Shared::SIDE> place;
    const uint8_t* packed[2];

    __device__ void begin(const Walk&) const {}
    __device__ void begin_slice(const Walk&, int, int) const {}
    __device__ void end() const {
        if (ahead.early > 0)
            each_item(Walk(ahead), Prefetch{ahead});
        for (int i = blockIdx.x * 64; ahead.norm != nullptr && i < ahead.K; i += gridDim.x * 64)
            prefetch_l2(static_cast<const uint16_t*>(ahead.norm) + i);
    }

    // Rows past the last are not there: what is made of them nobody reads.
    __device__ void run(const Item& item) {
        if (place.moves(weights, item.panel))
            for (int half = 0; half < 2; ++half)
                packed[half] = of_part(weights.packed, place.part, half);
        if (item.index == 0)
            Shared::barriers_ready();
        const typename Shared::Stage stage(item.index);
        Barrier& full = shared.full[stage.place];
        shared.empty[stage.place].wait(stage.parity ^ 1);
        if constexpr (Shared::SIDE == 1)
            copy_rows(item, stage.place, full);
        else
            copy_halves(item, stage.place, full);
        __syncwarp();
    }

    // Of half a panel, that are there.
    __device__ int rows_of(const Item& item, int half, int side = 0) const {
        return max(0, min(place.N - place.row(item.panel, half * HALF, side), HALF));
    }

    __device__ void copy_rows(const Item& item, int stage, Barrier& full) const {
        const int bytes = item.blocks * 32;
        int rows[2];
        for (int half = 0; half < 2; ++half)
            rows[half] = rows_of(item, half);
        if (elected()) {
            full.arrive_expecting((rows[0] + rows[1]) * bytes);
            for (int half = 0; half < 2; ++half) {
                const int64_t row_bytes = place.row_blocks * 32;
                const uint8_t* from = packed[half] + place.row(item.panel, half * HALF) * row_bytes + item.block * 32;
                uint8_t* to = shared.codes[stage][half * HALF];
#pragma unroll 8
                for (int r = 0; r < rows[half]; ++r, to += Shared::ROW_BYTES, from += row_bytes)
                    copy_bulk(to, from, bytes, full);
            }
        }
    }

    // Half panels in one piece each: rows of their own would take longer to ask for than to come.
    __device__ void copy_halves(const Item& item, int stage, Barrier& full) const {
        const int row_bytes = item.blocks * 32;
        int rows = 0;
#pragma unroll
        for (int side = 0; side < Shared::SIDE; ++side)
            rows += rows_of(item, 0, side) + rows_of(item, 1, side);
        if (elected()) {
            full.arrive_expecting(rows * row_bytes);
#pragma unroll 1
            for (int side = 0; side < Shared::SIDE; ++side)
                for (int half = 0; half < 2; ++half)
                    if (const int rows = rows_of(item, half, side); rows > 0) {
                        const int64_t row = place.row(item.panel, half * HALF, side);
                        uint8_t* to = shared.panel(stage, side) + half * HALF * row_bytes;
                        copy_bulk(to, packed[half] + row * row_bytes, rows * row_bytes, full);
                    }
        }
    }
};

// Four neighbouring scales of a weight, the first of them at `at`, the weight's last at `last`; ALIGNED: at multiples
// of four.
template <bool ALIGNED>
struct NestedScales {
    static constexpr bool IS_ALIGNED = ALIGNED;
    uint32_t codes, more, at;
    float nested, next;

    __device__ void read(const uint8_t* from, const float* scales, uint32_t at_, uint32_t last) {
        at = at_;
        codes = __ldg(reinterpret_cast<const uint32_t*>(from) + at / 4);
        nested = __ldg(scales + at / 256);
        if (ALIGNED)
            return;
        more = __ldg(reinterpret_cast<const uint32_t*>(from) + min(at / 4 + 1, last / 4));
        next = __ldg(scales + min(at + QUAD - 1, last) / 256);
    }

    __device__ void look_up(const Table& table, float (&v)[QUAD]) const {
        const uint32_t word = ALIGNED ? codes : __funnelshift_r(codes, more, at % 4 * 8);
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            v[j] = table.scale(word, j);
    }

    __device__ void scale(float offset, float (&v)[QUAD]) const {
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            v[j] = __fadd_rn(__fmul_rn(v[j], ALIGNED || at % 256 + j < 256 ? nested : next), offset);
    }
};

template <bool ALIGNED>
struct PlainScales {
    static constexpr bool IS_ALIGNED = ALIGNED;
    float values[QUAD];

    __device__ void read(const uint8_t* from, const float*, uint32_t at, uint32_t last) {
        const float* scales = reinterpret_cast<const float*>(from);
        if (ALIGNED) {
            const float4 v = __ldg(reinterpret_cast<const float4*>(scales + at));
            values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
            return;
        }
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            values[j] = __ldg(scales + min(at + j, last));
    }

    __device__ void look_up(const Table&, float (&v)[QUAD]) const {
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            v[j] = values[j];
    }

    __device__ void scale(float, float (&)[QUAD]) const {}
};

// The scales of an item are on their way while those of the one before are decoded.
template <typename Shared, typename Scales>
struct DecodeScales {
    Shared& shared;
    const Products& products;
    const Table& table;
    Place<Shared::SIDE> place;
    const uint8_t* codes[2];
    const float* nested[2];
    float offset[2];

    static constexpr int QUADS = Shared::WARPS, ROWS = 32 / QUADS, LOADS = PANEL / ROWS;
    // That are looked up before the first is used: all, if there are registers for them.
    static constexpr int TOGETHER = Scales::IS_ALIGNED ? LOADS : 2;

    struct Raw {
        int index = -1, blocks; // of the lane's quad that are there
        Scales scales[LOADS];
        float offset[2];
    } waiting;

    __device__ void begin(const Walk&) const {}
    __device__ void begin_slice(const Walk&, int, int) const {}
    __device__ void end() const { decode(waiting); }

    __device__ void run(const Item& item) {
        if (place.moves(products.weights, item.panel))
            for (int half = 0; half < 2; ++half) {
                codes[half] = of_part(products.weights.codes, place.part, half);
                nested[half] = of_part(products.weights.nested, place.part, half);
                offset[half] = of_part(products.offset, place.part, half);
            }
        if (Scales::IS_ALIGNED) {
            const Raw next = read(item);
            decode(waiting);
            waiting = next;
        } else { // registers for one item's alone
            decode(waiting);
            waiting = read(item);
        }
    }

    __device__ Raw read(const Item& item) const {
        const int side = lane_id() % QUADS / Shared::PANEL_WARPS, warp = lane_id() % Shared::PANEL_WARPS;
        const int quad = min(warp * QUAD, (item.blocks - 1) / QUAD * QUAD), block = item.block + quad;
        const uint32_t last = uint32_t(place.N) * place.row_blocks - 1;
        Raw raw;
        raw.index = item.index, raw.blocks = item.blocks - quad;
        raw.offset[0] = offset[0], raw.offset[1] = offset[1];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int half = i * ROWS / HALF, row = place.row(item.panel, i * ROWS, side) + lane_id() / QUADS;
            const uint32_t at = uint32_t(min(row, place.N - 1)) * place.row_blocks + block;
            raw.scales[i].read(codes[half], nested[half], at, last);
        }
        return raw;
    }

    // The first are on their way before the table is there.
    __device__ void decode(const Raw& raw) const {
        if (raw.index < 0)
            return;
        if (raw.index == 0)
            Shared::all_ready();
        const typename Shared::Stage stage(raw.index);
#pragma unroll
        for (int first = 0; first < LOADS; first += TOGETHER) {
            float v[TOGETHER][QUAD];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                raw.scales[first + i].look_up(table, v[i]);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                finish(raw, first + i, v[i]);
            if (first == 0)
                shared.empty[stage.place].wait(stage.parity ^ 1);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                store16(&shared.scales[stage.place][(first + i) * ROWS + lane_id() / QUADS][lane_id() % QUADS * QUAD],
                        v[i]);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.full[stage.place].arrive();
    }

    // Zeros where there is no block.
    __device__ static void finish(const Raw& raw, int i, float (&v)[QUAD]) {
        raw.scales[i].scale(raw.offset[i * ROWS / HALF], v);
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            v[j] = Scales::IS_ALIGNED || j < raw.blocks ? v[j] : 0.0f;
    }
};

// The reciprocal roots of the mean squares of rows `first`, `first` + `step` ... of x, by a warp; past the last row,
// the last one's. The order of a sum follows from K alone.
template <int COUNT>
__device__ void roots_of(const Products& products, int first, int step, float (&roots)[COUNT]) {
    const int K = products.weights.K, count = K / PANEL;
    float sums[COUNT] = {};
#pragma unroll 2
    for (int i = lane_id() * 4; i < count; i += 128)
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const int64_t row = min(first + n * step, products.rows_x - 1);
            const float4 v = *reinterpret_cast<const float4*>(products.norm.squares + row * count + i);
            sums[n] += (v.x + v.y) + (v.z + v.w);
        }
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
        roots[n] = reciprocal_root(warp_sum(sums[n]), K, products.norm.eps);
}

// The result of an mma, for rows of x that are there.
__device__ inline void store_sums(float (*sums)[SUM_ROW], const float (&total)[4], int rows_x) {
    const int g = lane_id() / 4, m = lane_id() % 4 * 2;
    if (m < rows_x)
        sums[m][g] = total[0], sums[m][g + 8] = total[2];
    if (m + 1 < rows_x)
        sums[m + 1][g] = total[1], sums[m + 1][g + 8] = total[3];
}

template <typename T, typename S>
struct Multiply {
    static constexpr int TILES = S::TILE / MMA_ROWS;

    S& shared;
    const Products& products;
    const Table& table;
    int warp, rows_x;
    uint4 (&fragments)[QUAD][TILES][2];

    __device__ void begin(const Walk& walk) const {
        if (products.norm.weight != nullptr)
            copy_norm(walk.blocks);
        wait_for_x();
    }
    __device__ void begin_slice(const Walk&, int block, int blocks) const {
        load_slice(block, blocks);
        if (products.norm.weight == nullptr)
            return;
        if (block == 0)
            make_roots();
        if (first() < blocks)
            norm_slice(block);
    }
    __device__ void end() const {}

    // Beside adapters x is there before the launch in front, which makes the hidden values, has ended.
    __device__ void wait_for_x() const {
        if constexpr (!S::ADAPTS) {
            wait_for_previous_kernel();
        } else {
            if (threadIdx.x == 0)
                wait_for_announced_end(products.arrived, gridDim.x);
            S::multipliers_meet();
        }
    }

    // The norm's weight lies behind everything else.
    __device__ T* norm_weight(int block) const { return reinterpret_cast<T*>(&shared + 1) + block * 64; }

    // What the warp will use of it, four blocks of each slice; zeros past the last.
    __device__ void copy_norm(int blocks) const {
        const T* weight = static_cast<const T*>(products.norm.weight);
        for (int quad = first(); quad < blocks; quad += products.weights.slice) {
            const int block = quad + lane_id() / 8, at = lane_id() % 8 * 8;
            if (block < blocks)
                copy16(norm_weight(block) + at, weight + block * 64 + at);
            else
                Raw8<T>{}.store(norm_weight(block) + at);
        }
    }

    // Elements in the order in which the bytes of W feed the contraction; zeros where x has no row or block.
    __device__ void load_slice(int block, int blocks) const {
        const int g = lane_id() / 4;
        const T* x = static_cast<const T*>(products.x) + int64_t(blockIdx.y * S::TILE + g) * products.weights.K;
        x += (block + first()) * 64 + lane_id() % 4 * 16;
#pragma unroll
        for (int n = 0; n < TILES; ++n, x += int64_t(MMA_ROWS) * products.weights.K) {
            const uint4* from = reinterpret_cast<const uint4*>(x);
            const int there = n * MMA_ROWS + g < rows_x ? blocks - first() : 0;
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    fragments[j][n][i] = j < there ? from[j * 8 + i] : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ void norm_slice(int block) const {
        const T* weight = norm_weight(block + first()) + lane_id() % 4 * 16;
#pragma unroll
        for (int j = 0; j < QUAD; ++j) {
            Raw8<T> of_weight[2];
            of_weight[0].load(weight + j * 64), of_weight[1].load(weight + j * 64 + 8);
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const float root = shared.roots[n * MMA_ROWS + lane_id() / 4];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    fragments[j][n][i] = multiplied(scaled(Raw8<T>{fragments[j][n][i]}, root), of_weight[i]).words;
            }
            __syncwarp(); // one block after the other: there are no registers for more
        }
    }

    __device__ void make_roots() const {
        constexpr int EACH = S::TILE > S::WARPS ? S::TILE / S::WARPS : 1; // rows, of one warp
        if (warp < S::TILE) {
            float roots[EACH];
            roots_of(products, blockIdx.y * S::TILE + warp, S::WARPS, roots);
#pragma unroll
            for (int n = 0; n < EACH; ++n)
                if (lane_id() == 0)
                    shared.roots[warp + n * S::WARPS] = roots[n];
        }
        wait_for_copies();
        S::multipliers_meet();
    }

    __device__ void run(const Item& item) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
        const bool works = first() < item.blocks;
        uint2 upper[QUAD], lower[QUAD]; // codes of rows g and g + 8
        float4 upper_scales, lower_scales;
        const typename S::Stage stage(item.index);
        shared.full[stage.place].wait(stage.parity);
        if (works) {
            const int row_bytes = S::SIDE == 1 ? S::ROW_BYTES : item.blocks * 32;
            const uint8_t* from = &shared.codes[stage.place][g][warp * QUAD * 32 + t * 8];
            if constexpr (S::SIDE > 1)
                from = shared.panel(stage.place, warp / S::PANEL_WARPS) + g * row_bytes + first() * 32 + t * 8;
#pragma unroll
            for (int j = 0; j < QUAD; ++j) {
                upper[j] = *reinterpret_cast<const uint2*>(from + j * 32);
                lower[j] = *reinterpret_cast<const uint2*>(from + 8 * row_bytes + j * 32);
            }
            upper_scales = *reinterpret_cast<const float4*>(&shared.scales[stage.place][g][warp * QUAD]);
            lower_scales = *reinterpret_cast<const float4*>(&shared.scales[stage.place][g + 8][warp * QUAD]);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.empty[stage.place].arrive();
        float total[TILES][4] = {};
        if (works) {
            const float up[QUAD] = {upper_scales.x, upper_scales.y, upper_scales.z, upper_scales.w};
            const float low[QUAD] = {lower_scales.x, lower_scales.y, lower_scales.z, lower_scales.w};
#pragma unroll
            for (int j = 0; j < QUAD; ++j)
                multiply_block(upper[j], lower[j], up[j], low[j], fragments[j], total);
        }
        const typename S::Buffer buffer(item.index);
        shared.taken[buffer.place].wait(buffer.parity ^ 1);
#pragma unroll
        for (int n = 0; n < TILES; ++n)
            store_sums(shared.sums[buffer.place][warp] + n * MMA_ROWS, total[n], rows_x - n * MMA_ROWS);
        __syncwarp();
        if (lane_id() == 0)
            shared.summed[buffer.place].arrive();
    }

    // Of the warp's blocks in a slice of its panel.
    __device__ int first() const { return (S::SIDE == 1 ? warp : warp % S::PANEL_WARPS) * QUAD; }

    __device__ void multiply_block(uint2 upper, uint2 lower, float up, float low, const uint4 (&b)[TILES][2],
                                   float (&total)[TILES][4]) const {
        float sum[TILES][4] = {};
#pragma unroll
        for (int word = 0; word < 2; ++word) {
            const uint32_t u = word ? upper.y : upper.x, l = word ? lower.y : lower.x;
            const uint32_t a0[4] = {table.pair(u, 0), table.pair(l, 0), table.pair(u, 1), table.pair(l, 1)};
            const uint32_t a1[4] = {table.pair(u, 2), table.pair(l, 2), table.pair(u, 3), table.pair(l, 3)};
#pragma unroll
            for (int n = 0; n < TILES; ++n)
                multiply_add(T{}, sum[n], a0, b[n][word].x, b[n][word].y);
#pragma unroll
            for (int n = 0; n < TILES; ++n)
                multiply_add(T{}, sum[n], a1, b[n][word].z, b[n][word].w);
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            total[n][0] = __fmaf_rn(up, sum[n][0], total[n][0]);
            total[n][1] = __fmaf_rn(up, sum[n][1], total[n][1]);
            total[n][2] = __fmaf_rn(low, sum[n][2], total[n][2]);
            total[n][3] = __fmaf_rn(low, sum[n][3], total[n][3]);
        }
    }
};

// Multiplies the adapters' hidden values by B on the tensor cores, a panel at a time, beside the warps that multiply
// codes; it arrives for every item as they do. B of what comes next is on its way meanwhile.
template <typename T, typename S, typename A>
struct Adapt {
    S& shared;
    const Products& products;
    int rows_x;
    int last;      // of the CTA's panels, past it
    Place<> place; // of the panel that is multiplied
    int width;     // ranks of its part, to a multiple of 16

    static constexpr int STEPS = 4, RANKS = 16 * STEPS; // on their way at once
    static constexpr int TOGETHER = 6;                  // chunks of hidden values that are, too

    // Elements of B of one panel: of rows g and g + 8, each at 2 t and the next one, then at 8 more.
    struct Coming {
        Place<> place;
        int ranks[2];
        A elements[STEPS][4][2];
    } coming;

    __device__ void begin(const Walk& walk) {
        last = walk.last;
        fetch(walk.first, 0);
        wait_for_previous_kernel();
    }
    __device__ void begin_slice(const Walk&, int, int) const {}
    __device__ void end() const {}

    __device__ void run(const Item& item) {
        float total[4] = {};
        if (item.is_last) {
            if (place.moves(products.weights, item.panel))
                begin_part();
            // Once without ranks, too: B of the next panel may be another product's.
            int k = 0;
#pragma unroll 1
            do
                multiply(item.panel, k, total);
            while ((k += RANKS) < width);
        }
        const typename S::Buffer buffer(item.index);
        shared.taken[buffer.place].wait(buffer.parity ^ 1);
        if (item.is_last)
            store_sums(shared.share[buffer.place], total, rows_x);
        __syncwarp();
        if (lane_id() == 0)
            shared.summed[buffer.place].arrive();
    }

    __device__ void begin_part() {
        const Adapter(&adapters)[2] = products.adapters[place.part];
        width = (max(adapters[0].rank, adapters[1].rank) + 15) / 16 * 16;
        for (int half = 0; half < (place.gated ? 2 : 1); ++half)
            read_hidden(adapters[half], shared.hidden[lane_id() / 4] + half * MAX_RANK);
        __syncwarp();
    }

    // A half's hidden values as they enter an mma, rounded as a linear layer and the scaling behind it round; zeros up
    // to the width. Four lanes share a row of x.
    __device__ void read_hidden(const Adapter& adapter, uint16_t* to) const {
        const int chunks = (products.weights.K + CHUNK - 1) / CHUNK, stride = rows_x * products.ranks;
        const int m = lane_id() / 4, rank = m < rows_x ? adapter.rank : 0;
        const float* from = products.hidden + m * products.ranks + adapter.column;
        const float* factors = adapter.factors == nullptr ? nullptr : adapter.factors + m * adapter.rank;
        const float scaling = adapter.scaling;
#pragma unroll 1
        for (int k = lane_id() % 4 * 4; k < width; k += 16) {
            float dots[4] = {};
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; chunk += TOGETHER)
                add_chunks(from + chunk * stride + k, stride, chunks - chunk, rank - k, dots);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float factor = factors != nullptr && k + i < rank ? factors[k + i] : scaling;
                to[k + i] = narrow<T>(rounded<T>(dots[i]) * factor).bits;
            }
        }
    }

    // From element `k` of each row on; zeros past its end.
    __device__ void fetch(int panel, int k) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        if (coming.place.moves(products.weights, panel))
            for (int half = 0; half < 2; ++half)
                coming.ranks[half] = products.adapters[coming.place.part][half].rank;
        const A* rows[2];
        for (int half = 0; half < 2; ++half) {
            const int row = min(coming.place.row(panel, half * HALF) + g, coming.place.N - 1);
            const A* b = static_cast<const A*>(products.adapters[coming.place.part][half].b);
            rows[half] = b + int64_t(row) * coming.ranks[half];
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int at = k + 16 * s + i / 2 * 8 + 2 * t + e;
                    coming.elements[s][i][e] = at < coming.ranks[i % 2] ? rows[i % 2][at] : A{};
                }
    }

    // Of at most TOGETHER chunks, whose loads are on their way side by side.
    __device__ static void add_chunks(const float* from, int stride, int chunks, int ranks, float (&dots)[4]) {
        float parts[TOGETHER][4];
#pragma unroll
        for (int chunk = 0; chunk < TOGETHER; ++chunk)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                parts[chunk][i] = chunk < chunks && i < ranks ? from[chunk * stride + i] : 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < TOGETHER; ++chunk)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                dots[i] += parts[chunk][i];
    }

    // Ranks [k, k + RANKS) of a panel. Hidden values of one half belong to both unless the halves are a gate's and an
    // up projection's.
    __device__ void multiply(int panel, int k, float (&total)[4]) {
        uint32_t b[STEPS][4];
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                b[s][i] = narrow2<T>(widen(coming.elements[s][i][0]), widen(coming.elements[s][i][1]));
        const bool more = k + RANKS < width;
        if (more || panel + 1 < last)
            fetch(more ? panel : panel + 1, more ? k + RANKS : 0);
        const uint16_t* hidden = shared.hidden[lane_id() / 4] + k + lane_id() % 4 * 2;
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            if (k + 16 * s >= width)
                break;
            const uint32_t upper[4] = {b[s][0], place.gated ? 0 : b[s][1], b[s][2], place.gated ? 0 : b[s][3]};
            multiply_add(T{}, total, upper, word(hidden + 16 * s), word(hidden + 16 * s + 8));
            if (place.gated) {
                const uint32_t lower[4] = {0, b[s][1], 0, b[s][3]};
                const uint16_t* of_up = hidden + MAX_RANK + 16 * s;
                multiply_add(T{}, total, lower, word(of_up), word(of_up + 8));
            }
        }
    }

    __device__ static uint32_t word(const uint16_t* from) { return *reinterpret_cast<const uint32_t*>(from); }
};

// Adds the warps' sums in ascending order of K, and those of the slices; each of the FINISHERS of eight rows of x. A
// lane has four rows of W and one of x; rows of x four apart, which two lanes beside each other have, lie in different
// banks.
template <typename T, typename S>
struct Finish {
    S& shared;
    const Products& products;
    int which, rows_x;
    float factor;
    Place<S::SIDE> place;
    T* out;
    const T* bias;
    bool adapted;

    __device__ void begin(const Walk&) const { wait_for_previous_kernel(); }
    __device__ void begin_slice(const Walk&, int, int) const {}
    __device__ void end() const {}

    __device__ void run(const Item& item) {
        const int m = which * MMA_ROWS + lane_id() / 4 % 2 * 4 + lane_id() / 8, r = lane_id() % 4 * 4;
        if (place.moves(products.weights, item.panel))
            read_part(m, r);
        const typename S::Buffer buffer(item.index);
        uint2 before[S::SIDE];
#pragma unroll
        for (int side = 0; side < S::SIDE; ++side)
            before[side] = load_residual(m, place.row(item.panel, r, side));
        shared.summed[buffer.place].wait(buffer.parity);
#pragma unroll
        for (int side = 0; side < S::SIDE; ++side) {
            const float4 sum = add(item, buffer.place, side, m, r);
            if (item.is_last) {
                float v[4] = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
                const int n = place.row(item.panel, r, side);
                finish(shared.share[buffer.place][S::ADAPTS ? m : 0] + r, m, n, v);
                if (products.residual.values != nullptr)
                    add_residual(before[side], m, n, v);
                if (!(place.gated && r >= HALF))
                    store4(m, n, v);
            }
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.taken[buffer.place].arrive();
    }

    __device__ void read_part(int m, int r) {
        out = static_cast<T*>(products.out[place.part]) + int64_t(blockIdx.y * S::TILE + m) * place.N;
        bias = static_cast<const T*>(products.bias[place.part][r / HALF]);
        adapted = products.adapters[place.part][r / HALF].rank > 0;
    }

    // Sums of rows of x that are not there are never used.
    __device__ float4 add(const Item& item, int buffer, int side, int m, int r) const {
        float4& kept = *reinterpret_cast<float4*>(&shared.kept[item.place][m][r]);
        float4 sum = item.is_first ? make_float4(0, 0, 0, 0) : kept;
        const auto sums = shared.sums[buffer] + side * S::PANEL_WARPS;
        float4 v[S::PANEL_WARPS];
#pragma unroll
        for (int warp = 0; warp < S::PANEL_WARPS; ++warp)
            v[warp] = warp * QUAD < item.blocks && m < rows_x ? *reinterpret_cast<const float4*>(&sums[warp][m][r])
                                                              : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int warp = 0; warp < S::PANEL_WARPS; ++warp)
            sum.x += v[warp].x, sum.y += v[warp].y, sum.z += v[warp].z, sum.w += v[warp].w;
        if (!item.is_last)
            kept = sum;
        return sum;
    }

    // The product gets its bias, its adapter's share and its gate.
    __device__ void finish(const float* share, int m, int n, float (&v)[4]) const {
        if (bias != nullptr) {
            float b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                b[i] = n + i < place.N ? widen(bias[n + i]) : 0.0f;
            add_rounded<T>(v, b);
        }
        if (S::ADAPTS && adapted && m < rows_x) {
            const float4 s = *reinterpret_cast<const float4*>(share);
            add_rounded<T>(v, {s.x, s.y, s.z, s.w});
        }
        if (place.gated) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float gate = rounded<T>(v[i]), up = __shfl_xor_sync(~0u, gate, 2);
                v[i] = silu<T>(gate) * up;
            }
        }
    }

    // N is a multiple of 16 beside a residual.
    __device__ uint2 load_residual(int m, int n) const {
        const T* values = static_cast<const T*>(products.residual.values);
        if (values == nullptr || m >= rows_x || n >= place.N)
            return make_uint2(0, 0);
        return *reinterpret_cast<const uint2*>(values + int64_t(blockIdx.y * S::TILE + m) * place.N + n);
    }

    // Four lanes have a panel's part of a row.
    __device__ void add_residual(uint2 before, int m, int n, float (&v)[4]) const {
        add_rounded<T>(v, {low<T>(before.x), high<T>(before.x), low<T>(before.y), high<T>(before.y)});
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            squares = fmaf(rounded<T>(v[i]), rounded<T>(v[i]), squares);
        squares += __shfl_xor_sync(FULL_WARP, squares, 1);
        squares += __shfl_xor_sync(FULL_WARP, squares, 2);
        if (lane_id() % 4 == 0 && m < rows_x && n < place.N)
            products.residual.squares[int64_t(blockIdx.y * S::TILE + m) * (place.N / PANEL) + n / PANEL] = squares;
    }

    __device__ void store4(int m, int n, const float (&v)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (m < rows_x && n + i < place.N)
                out[n + i] = narrow<T>(v[i]);
    }
};

template <typename Shared>
__device__ void init_barriers(Shared& shared) {
    for (int i = 0; i < Shared::STAGES; ++i)
        shared.full[i].init(2), shared.empty[i].init(Shared::WARPS);
    for (int i = 0; i < SUM_BUFFERS; ++i)
        shared.summed[i].init(Shared::WARPS + Shared::ADAPTS), shared.taken[i].init(Shared::FINISHERS);
    Barrier::publish();
}

// What the table is made of is on its way while the rest is computed.
template <typename T, typename Shared>
__device__ void fill_tables(Shared& shared, const Codebook& codebook, const float* map, float gain) {
    constexpr int THREADS = 32 * Shared::WARPS, EIGHTHS = 256 * 8 / THREADS;
    float scales[EIGHTHS];
#pragma unroll
    for (int i = 0; i < EIGHTHS; ++i)
        scales[i] = map == nullptr ? 0.0f : __ldg(map + (threadIdx.x + i * THREADS) / 8);
    const float entry = codebook.values[lane_id() % 16] * gain;
    fill_table(shared.table, 0, THREADS,
               [&](int b) { return narrow2<T>(lookup16(entry, b >> 4), lookup16(entry, b)); });
#pragma unroll
    for (int i = 0; i < EIGHTHS; ++i)
        fill_eighth(shared.table, 1, threadIdx.x + i * THREADS, __float_as_uint(scales[i]));
}

// Where panels are side by side there are registers for scales of any place alone.
template <typename Shared>
__device__ void decode_scales(Shared& shared, const Products& products, const Table& table, const Walk& walk) {
    if constexpr (!Shared::ANY)
        each_item(walk, DecodeScales<Shared, NestedScales<true>>{shared, products, table});
    else if (!products.weights.plain)
        each_item(walk, DecodeScales<Shared, NestedScales<false>>{shared, products, table});
    else if (Shared::SIDE == 1 && walk.blocks % QUAD == 0)
        each_item(walk, DecodeScales<Shared, PlainScales<true>>{shared, products, table});
    else
        each_item(walk, DecodeScales<Shared, PlainScales<false>>{shared, products, table});
}

template <typename T, typename S>
__device__ void gemv_bulk(const Products& products, const Weights& ahead, const Codebook& codebook, float gain) {
    extern __shared__ uint4 dynamic[];
    S& shared = *reinterpret_cast<S*>(dynamic);
    let_next_kernel_start();
    const int warp = threadIdx.x / 32;
    const Table table = Table::first(dynamic);
    const int rows_x = min(products.rows_x - int(blockIdx.y) * S::TILE, S::TILE);
    const Walk walk(products.weights);

    if (warp < S::WARPS) {
        fill_tables<T>(shared, codebook, products.map, gain);
        S::all_ready();
        uint4 fragments[QUAD][S::TILE / MMA_ROWS][2];
        each_item(walk, Multiply<T, S>{shared, products, table, warp, rows_x, fragments});
    } else if (warp == S::WARPS) {
        each_item(walk, Copy<S>{shared, products.weights, ahead});
    } else if (warp == S::WARPS + 1) {
        decode_scales(shared, products, table, walk);
    } else if (warp < S::WARPS + 2 + S::FINISHERS) {
        const int which = warp - S::WARPS - 2;
        if (which == 0) {
            if (elected())
                init_barriers(shared);
            __syncwarp();
            S::barriers_ready();
        }
        S::all_ready();
        each_item(walk, Finish<T, S>{shared, products, which, rows_x, 1.0f / gain});
    } else {
        S::all_ready();
        if constexpr (S::ADAPTS) {
            // There are ranks; without being asked the compiler spills registers.
            if (products.ranks > 0 && products.adapters_fp32)
                each_item(walk, Adapt<T, S, float>{shared, products, rows_x});
            else if (products.ranks > 0)
                each_item(walk, Adapt<T, S, T>{shared, products, rows_x});
        }
    }
}

#define BODY(T, tile, side, adapts, any, warps, shared_bytes)                                                          \
    using Form = Shared<tile, side, adapts, any>;                                                                      \
    static_assert(Form::WARPS == warps && sizeof(Form) == shared_bytes, "as the launcher's");                          \
    gemv_bulk<T, Form>(products, ahead, codebook, gain);

#else

#define BODY(T, tile, side, adapts, any, warps, shared_bytes)

#endif

// x, packed, A and plain scales 16-byte aligned, or nested ones with one map for all and codes 4-byte aligned, blocks
// of 64, K % 64 == 0, every N * K a multiple of 256 and below 2^38; a norm's weight 16-byte aligned, with room for it
// behind the shared memory; unused parts begin past the last panel; grid (any, tiles of x); with adapters at most
// MMA_ROWS rows of x; beside each other panels of a K that PANEL_WARPS cover.
#define GEMV_4BIT_BULK_OF(T, name, tile, side, adapts, any, warps, shared_bytes)                                       \
    extern "C" __global__ void __launch_bounds__(32 * (warps + 4), 1)                                                  \
        gemv_4bit_bulk_##name(const __grid_constant__ Products products, const __grid_constant__ Weights ahead,        \
                              const __grid_constant__ Codebook codebook, float gain) {                                 \
        BODY(T, tile, side, adapts, any, warps, shared_bytes)                                                          \
    }
#define GEMV_4BIT_BULK(name, ...)                                                                                      \
    GEMV_4BIT_BULK_OF(f16, name##_f16, __VA_ARGS__)                                                                    \
    GEMV_4BIT_BULK_OF(bf16, name##_bf16, __VA_ARGS__)

GEMV_4BIT_BULK(8, 8, 1, false, false, 16, 170768)
GEMV_4BIT_BULK(16, 16, 1, false, false, 8, 180560)
GEMV_4BIT_BULK(8_any, 8, 1, false, true, 16, 170768)
GEMV_4BIT_BULK(16_any, 16, 1, false, true, 8, 180560)
GEMV_4BIT_BULK(8_short_any, 8, 4, false, true, 16, 170768)
GEMV_4BIT_BULK(16_short_any, 16, 2, false, true, 8, 180560)
GEMV_4BIT_BULK(8_adapted, 8, 1, true, false, 16, 179168)
GEMV_4BIT_BULK(8_adapted_any, 8, 1, true, true, 16, 179168)

constexpr int HIDDEN_THREADS = CHUNK / 16;
constexpr int FEW_ROWS = 4; // of x, that need no shared memory

#if HAS_ROOM

// sum + the products of eight values each.
template <typename T>
__device__ float dot8(float sum, const Raw8<T>& a, const Raw8<T>& b) {
    float of_a[8], of_b[8];
    a.unpack(of_a), b.unpack(of_b);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        sum = fmaf(of_a[i], of_b[i], sum);
    return sum;
}

// What one chunk of K gives to one hidden value, for every row of x, in shared memory: a thread's eights of A, of the
// norm's weight and of each row, which nobody else touches.
template <typename T>
struct HiddenShare {
    static constexpr int OF_WEIGHT = 1, OF_X = 2; // rows of shared memory behind that of A
    static constexpr int WARPS = HIDDEN_THREADS / 32;

    const Products& products;
    float (&sums)[MMA_ROWS][WARPS];
    int first; // element of K
    bool reads;

    __device__ static T* at(int row, int i) {
        extern __shared__ uint4 dynamic[];
        return reinterpret_cast<T*>(dynamic + (2 * row + i) * HIDDEN_THREADS + threadIdx.x);
    }

    __device__ static Raw8<T> load(int row, int i) {
        Raw8<T> raw;
        raw.load(at(row, i));
        return raw;
    }

    // From row `row` of a matrix.
    __device__ void copy(int to, const void* matrix, int row) const {
        const T* from = static_cast<const T*>(matrix) + int64_t(row) * products.weights.K + first;
        for (int i = 0; i < 2; ++i)
            copy16(at(to, i), from + i * 8);
    }

    // A's elements are rounded to x's dtype, as the layer uses them.
    __device__ void load_a(const Adapter& adapter) const {
        const int64_t begin = int64_t(blockIdx.x - adapter.column) * products.weights.K + first;
        float v[2][8] = {};
        if (reads && products.adapters_fp32)
            load16(static_cast<const float*>(adapter.a) + begin, v);
        else if (reads)
            load16(static_cast<const T*>(adapter.a) + begin, v);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Raw8<T> raw;
            raw.pack(v[i]);
            raw.store(at(0, i));
        }
    }

    template <typename A>
    __device__ static void load16(const A* from, float (&v)[2][8]) {
        load8(from, v[0]), load8(from + 8, v[1]);
    }

    // A few rows of x as they come from memory: less time to the first one.
    __device__ void dot_few() const {
#pragma unroll 2
        for (int m = 0; m < products.rows_x; ++m) {
            float dot = 0;
            if (reads) {
                const T* x = static_cast<const T*>(products.x) + int64_t(m) * products.weights.K + first;
                Raw8<T> of_x[2];
                of_x[0].load(x), of_x[1].load(x + 8);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    dot = dot8(dot, load(0, i), of_x[i]);
            }
            dot = warp_sum(dot);
            if (lane_id() == 0)
                sums[m][threadIdx.x / 32] = dot;
        }
    }

    // Rows of x that are normed, or more of them, come to shared memory together; with the same bits.
    __device__ void dot_many(float (&roots)[MMA_ROWS]) const {
        if (reads)
            for (int m = 0; m < products.rows_x; ++m)
                copy(OF_X + m, products.x, m);
        if (products.norm.weight != nullptr)
            make_roots(roots);
        wait_for_copies();
        if (reads && products.norm.weight != nullptr)
            norm(roots);
        float dots[MMA_ROWS] = {};
        if (reads)
#pragma unroll
            for (int m = 0; m < MMA_ROWS; ++m)
                if (m < products.rows_x)
#pragma unroll 1
                    for (int i = 0; i < 2; ++i) // one after the other, for want of registers
                        dots[m] = dot8(dots[m], load(0, i), load(OF_X + m, i));
        const float dot = warp_sums(dots);
        if (lane_id() % 4 == 0)
            sums[lane_id() / 4][threadIdx.x / 32] = dot;
    }

    __device__ void make_roots(float (&roots)[MMA_ROWS]) const {
        for (int m = threadIdx.x / 32; m < products.rows_x; m += WARPS) { // one at a time, for want of registers
            float root[1];
            roots_of(products, m, WARPS, root);
            if (lane_id() == 0)
                roots[m] = root[0];
        }
        __syncthreads();
    }

    __device__ void norm(const float (&roots)[MMA_ROWS]) const {
#pragma unroll 1
        for (int m = 0; m < products.rows_x; ++m)
#pragma unroll 1
            for (int i = 0; i < 2; ++i)
                multiplied(scaled(load(OF_X + m, i), roots[m]), load(OF_WEIGHT, i)).store(at(OF_X + m, i));
    }
};

// A and the norm's weight are here before x is.
template <typename T>
__device__ void make_hidden(const Products& products) {
    using Share = HiddenShare<T>;
    __shared__ float sums[MMA_ROWS][Share::WARPS], roots[MMA_ROWS];
    const int first = blockIdx.y * CHUNK + threadIdx.x * 16;
    const bool norms = products.norm.weight != nullptr;
    const Share share{products, sums, first, first < products.weights.K};
    if (share.reads && norms)
        share.copy(Share::OF_WEIGHT, products.norm.weight, 0);
    share.load_a(adapter_of(products, blockIdx.x));
    wait_for_previous_kernel();
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0)
        announce_end(products.arrived);
    if (norms || products.rows_x > FEW_ROWS)
        share.dot_many(roots);
    else
        share.dot_few();
    __syncthreads();
    if (const int m = threadIdx.x; m < products.rows_x) {
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < Share::WARPS; ++warp)
            sum += sums[m][warp];
        products.hidden[(int64_t(blockIdx.y) * products.rows_x + m) * products.ranks + blockIdx.x] = sum;
    }
}

#else

template <typename T>
__device__ void make_hidden(const Products&) {}

#endif

// x and A 16-byte aligned, K % 16 == 0, at most MMA_ROWS rows of x; grid (hidden values, chunks); dynamic shared memory
// of a chunk of A and, with a norm or more than FEW_ROWS rows of x, of its weight and of each row. Registers for one
// CTA beside one of the products.
#define GEMV_4BIT_HIDDEN(T, dtype)                                                                                     \
    extern "C" __global__ void __launch_bounds__(HIDDEN_THREADS, 16)                                                   \
        gemv_4bit_hidden_##dtype(const __grid_constant__ Products products) {                                          \
        let_next_kernel_start();                                                                                       \
        make_hidden<T>(products);                                                                                      \
    }

GEMV_4BIT_HIDDEN(f16, f16)
GEMV_4BIT_HIDDEN(bf16, bf16)
