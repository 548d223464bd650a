// What a launch of gemv_4bit_bulk is asked to do, and the order in which a CTA does it.
#pragma once
#include <limits.h>
#include <stdint.h>

constexpr int MAX_PARTS = 4;
constexpr int PANEL = 16; // rows of W of one mma
constexpr int HALF = PANEL / 2;
constexpr int GROUP = 16; // panels that go through the slices of K together
constexpr int MAX_RANK = 256;
constexpr int CHUNK = 2048; // elements of K that make a share of a hidden value
constexpr int SUM_BUFFERS = 2;

// Rows 0..7 of a panel come from a part's first weight, 8..15 from its second: where both are one weight a panel is 16
// of its rows, of a gate and an up projection it is 8 of each.
template <typename V>
using OfParts = V[MAX_PARTS][2];

// The weights [N, K] of all products, laid out as the launcher's `Weights`. A launch begins with reading this, and what
// lies together comes together: first what says where to go, then each kind of pointer.
struct alignas(64) Weights {
    int K, slice;                             // blocks of a slice of K
    int share, rest;                          // panels of each CTA, and one more for the first so many
    int early;                                // items of each CTA that may be moved to L2 before the launch
    bool gated;                               // parts are pairs of gate and up
    bool plain;                               // scales are fp32, in place of codes
    int N[MAX_PARTS], first_panel[MAX_PARTS]; // parts that are not there begin past the last panel
    OfParts<const uint8_t*> packed, codes;    // codes of the scales, or the scales
    OfParts<const float*> nested;             // scales of the scales
    const void* norm;                         // [K] of 16 bits, the weight of x's norm, to be moved to L2, or null
};

// The adapter beside a weight.
struct Adapter {
    const void* a;        // [rank, K], fp32 or as x
    const void* b;        // [N, rank]
    const float* factors; // [rows of x, rank], null where scaling is all
    float scaling;
    int rank, column; // 0 without an adapter; the first of its hidden values among all
};

// What x is still to go through, laid out as the launcher's `Norm`.
struct Norm {
    const void* weight;   // [K], as x; null where x is to be read as it is
    const float* squares; // [rows_x, K / PANEL], sums over neighbours in x
    float eps;
};

// What the one product is added to, laid out as the launcher's `Residual`.
struct Residual {
    const void* values; // [rows_x, N], as x; null where there is none
    float* squares;     // [rows_x, panels], of what comes out
};

// Products of one x, laid out as the launcher's `Products`.
struct Products {
    Weights weights;
    OfParts<float> offset; // of the scales
    const float* map;      // of the scales' codes
    const void* x;         // [rows_x, K]
    float* hidden;         // [chunks of K, rows_x, ranks], of the adapters
    uint32_t* arrived;     // zero; null without adapters
    int rows_x, ranks;
    bool adapters_fp32; // else as x
    Norm norm;
    Residual residual;
    void* out[MAX_PARTS];
    OfParts<const void*> bias; // [N] or null
    OfParts<Adapter> adapters;
};

// What belongs to a part. No index: all are read at once, and parameters are far away.
template <typename V>
__device__ V of_part(const V (&values)[MAX_PARTS], int part) {
    V value = values[0];
#pragma unroll
    for (int i = 1; i < MAX_PARTS; ++i)
        value = part == i ? values[i] : value;
    return value;
}

template <typename V>
__device__ V of_part(const OfParts<V>& values, int part, int half) {
    V value = values[0][half];
#pragma unroll
    for (int i = 1; i < MAX_PARTS; ++i)
        value = part == i ? values[i][half] : value;
    return value;
}

// One panel of one slice of K.
struct Item {
    int index, panel, block, blocks; // blocks [block, block + blocks) of each row
    int place;                       // of the panel in its group
    bool is_first, is_last;          // slice
};

// Where an item's turn comes in a ring of COUNT places.
template <int COUNT>
struct Turn {
    int place, parity;

    __device__ explicit Turn(uint32_t index) : place(index % COUNT), parity(index / COUNT % 2) {}
};

// The CTA's share: panels [first, last); blocks of a row, of a slice.
struct Walk {
    int first, last, blocks, slice;

    __device__ explicit Walk(const Weights& weights) : blocks(weights.K / 64), slice(weights.slice) {
        first = blockIdx.x * weights.share + min(int(blockIdx.x), weights.rest);
        last = first + weights.share + (int(blockIdx.x) < weights.rest);
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

// Where a panel lies; what a part says stays in registers. SIDE panels that are taken side by side count as one.
template <int SIDE = 1>
struct Place {
    int part, begin = 0, end = 0; // panels of the part
    int N, row_blocks;
    bool gated;

    // Whether the panel lies in another part than the one before.
    __device__ bool moves(const Weights& weights, int panel) {
        if (panel >= begin && panel < end)
            return false;
        part = 0, begin = 0, end = INT_MAX;
#pragma unroll
        for (int i = 1; i < MAX_PARTS; ++i) {
            const int first = weights.first_panel[i];
            if (panel >= first)
                part = i, begin = first;
            else
                end = min(end, first);
        }
        N = of_part(weights.N, part), row_blocks = weights.K / 64, gated = weights.gated;
        return true;
    }

    // The row of its weight that row `r` of a panel is, `side` of those side by side.
    __device__ int row(int panel, int r, int side = 0) const {
        return ((panel - begin) * SIDE + side) * (gated ? HALF : PANEL) + (gated ? r % HALF : r);
    }
};

// The adapter that has the hidden value `r`.
__device__ inline const Adapter& adapter_of(const Products& products, int r) {
    int i = 0;
    while (i + 1 < 2 * MAX_PARTS) {
        const Adapter& adapter = products.adapters[i / 2][i % 2];
        if (r >= adapter.column && r < adapter.column + adapter.rank)
            break;
        ++i;
    }
    return products.adapters[i / 2][i % 2];
}
