// What the warps of gemv_4bit_bulk share, and how they meet.
#pragma once
#include "mma.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "pipeline.cuh"
#include "products.cuh"

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

// The result of an mma, for rows of x that are there.
__device__ inline void store_sums(float (*sums)[SUM_ROW], const float (&total)[4], int rows_x) {
    const int g = lane_id() / 4, m = lane_id() % 4 * 2;
    if (m < rows_x)
        sums[m][g] = total[0], sums[m][g + 8] = total[2];
    if (m + 1 < rows_x)
        sums[m + 1][g] = total[1], sums[m + 1][g + 8] = total[3];
}

#endif
