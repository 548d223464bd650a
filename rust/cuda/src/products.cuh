// What a launch of gemv_4bit_bulk is asked to do, and the order in which a CTA does it.
#pragma once
#include <limits.h>

#include "absmax.cuh"
#include "scalars.cuh"

constexpr int MAX_PARTS = 4;
constexpr int PANEL = 16; // rows of W of one mma
constexpr int HALF = PANEL / 2;
constexpr int GROUP = 16; // panels that go through the slices of K together
constexpr int MAX_RANK = 256;
constexpr int CHUNK = 2048; // elements of K that make a share of a hidden value
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
    int rank, column; // 0 without an adapter; the first of its hidden values among all
};

// One product and where it goes. Rows 0..7 of a panel come from the first weight, 8..15 from the second: of one weight
// a panel is 16 rows, of a gate and an up projection it is 8 of each.
struct Part {
    Weight halves[2];
    void* out;
    int N, first_panel;
};

// Products of one x, laid out as the launcher's `Products`.
struct Products {
    Part parts[MAX_PARTS]; // those that are not there begin past the last panel
    const void* x;         // [rows_x, K]
    float* hidden;         // [chunks of K, rows_x, ranks], of the adapters
    int K, slice;          // blocks of a slice of K
    int share, rest;       // panels of each CTA, and one more for the first so many
    int rows_x, ranks;
    int early;          // items of each CTA that may be moved to L2 before the launch
    bool gated;         // parts are pairs of gate and up
    bool adapters_fp32; // else as x
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

// The CTA's share: panels [first, last); blocks of a row, of a slice.
struct Walk {
    int first, last, blocks, slice;

    __device__ explicit Walk(const Products& products) : blocks(products.K / 64), slice(products.slice) {
        first = blockIdx.x * products.share + min(int(blockIdx.x), products.rest);
        last = first + products.share + (int(blockIdx.x) < products.rest);
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
template <typename Job>
__device__ void each_item(const Walk& walk, Job&& job) {
    int index = 0;
    job.begin(walk);
#pragma unroll 1
    for (int group = walk.first; group < walk.last; group += GROUP)
        walk.each_slice([&](int block, int blocks) {
            job.begin_slice(walk, block, blocks);
#pragma unroll 1
            for (int panel = group; panel < min(group + GROUP, walk.last); ++panel, ++index)
                job.run({index, panel, block, blocks, panel - group, block == 0, block + blocks == walk.blocks});
        });
    job.end();
}

// Where a panel lies. The parameters are far away when they are indexed: what a part says stays in registers.
struct Place {
    int part, begin = 0, end = 0; // panels of the part
    int N, row_blocks;
    bool gated;

    // Whether the panel lies in another part than the one before.
    __device__ bool moves(const Products& products, int panel) {
        if (panel >= begin && panel < end)
            return false;
        part = 0;
        while (part + 1 < MAX_PARTS && panel >= products.parts[part + 1].first_panel)
            ++part;
        begin = products.parts[part].first_panel;
        // Parts that are not there begin where the last one ends.
        end = part + 1 < MAX_PARTS ? products.parts[part + 1].first_panel : INT_MAX;
        if (end <= begin)
            end = INT_MAX;
        N = products.parts[part].N, row_blocks = products.K / 64, gated = products.gated;
        return true;
    }

    // The row of its weight that row `r` of a panel is.
    __device__ int row(int panel, int r) const {
        return (panel - begin) * (gated ? HALF : PANEL) + (gated ? r % HALF : r);
    }
};

// The weight whose adapter has the hidden value `r`.
__device__ inline const Weight& adapter_of(const Products& products, int r) {
    int i = 0;
    while (i + 1 < 2 * MAX_PARTS) {
        const Weight& weight = products.parts[i / 2].halves[i % 2];
        if (r >= weight.column && r < weight.column + weight.rank)
            break;
        ++i;
    }
    return products.parts[i / 2].halves[i % 2];
}
