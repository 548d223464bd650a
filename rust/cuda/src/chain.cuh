// What a chain of products is asked to do, and the order in which a CTA does it (gemv_4bit_bulk).
#pragma once
#include <limits.h>

#include "absmax.cuh"
#include "scalars.cuh"

constexpr int MAX_PARTS = 4;
constexpr int MAX_PHASES = 4;
constexpr int PANEL = 16; // rows of W of one mma
constexpr int HALF = PANEL / 2;
constexpr int GROUP = 16; // panels that go through the slices of K together
constexpr int STAGES = 2;
constexpr int SUM_BUFFERS = 2;

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
    int count, rows_x;
    // [1 + MAX_PHASES] zeros, and zeros again at the end: CTAs that have made their share of the outputs so far, and
    // of each phase's hidden values. Null where no CTA needs another.
    uint32_t* arrived;
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
                job.begin_slice(p, block, blocks);
#pragma unroll 1
                for (int panel = group; panel < min(group + GROUP, walk.last); ++panel, ++index)
                    job.run({index, p, panel, block, blocks, panel - group, block == 0, block + blocks == walk.blocks});
            });
        job.end_phase(p);
    }
}

// Where an item lies. The parameters are far away when they are indexed: what a part says stays in registers.
struct Place {
    int phase = -1, part, begin, end; // panels of the part
    int N, row_blocks;
    bool gated;

    // Whether the item lies in another part than the one before.
    template <int PHASES>
    __device__ bool moves(const Chain<PHASES>& chain, const Item& item) {
        if (item.phase == phase && item.panel >= begin && item.panel < end)
            return false;
        phase = item.phase;
        const Phase& now = chain.phases[phase];
        part = 0;
        while (part + 1 < MAX_PARTS && item.panel >= now.parts[part + 1].first_panel)
            ++part;
        begin = now.parts[part].first_panel;
        // Parts that are not there begin where the last one ends.
        end = part + 1 < MAX_PARTS ? now.parts[part + 1].first_panel : INT_MAX;
        if (end <= begin)
            end = INT_MAX;
        N = now.parts[part].N, row_blocks = now.K / 64;
        gated = PHASES > 1 && now.gated;
        return true;
    }

    // The row of its weight that row `r` of a panel is.
    __device__ int row(int panel, int r) const {
        return (panel - begin) * (gated ? HALF : PANEL) + (gated ? r % HALF : r);
    }
};

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

// Lets who waits for this count see what the warp has written.
__device__ inline void arrive(uint32_t* count) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

__device__ inline uint32_t arrive_and_count(uint32_t* count) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
    return before;
}

__device__ inline void wait_for(const uint32_t* count, uint32_t expected) {
    uint32_t seen;
    do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
    while (seen < expected);
}
