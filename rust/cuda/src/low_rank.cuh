// Adapters beside products: factors * (x Aᵀ) Bᵀ. A launch of its own, low_rank's, makes the hidden values, factors *
// (x Aᵀ), rounded as they enter a product; what is here multiplies them by B on the tensor cores.
#pragma once
#include "memory.cuh"
#include "mma.cuh"

constexpr int RANKS = 16; // of one mma: hidden values of an adapter begin at a multiple of it, zeros behind the last

__device__ inline int padded(int rank) { return (rank + RANKS - 1) / RANKS * RANKS; }

// B [N, rank] beside a weight, fp32 or as x. Laid out as the launcher's `Share`.
struct Share {
    const void* b;
    int rank, column; // 0 without an adapter; of the first hidden value

    // Moves what lanes read of two rows from element `k` on to L2, a line each of the four that share a row.
    __device__ void prefetch(bool fp32, const int (&rows)[2], int k) const {
        const int size = fp32 ? 4 : 2, line = 128 / size;
        for (int i = 0; i < 2; ++i)
            for (int at = k + lane_id() % 4 * line; at < rank; at += 4 * line)
                prefetch_l2(static_cast<const char*>(b) + (int64_t(rows[i]) * rank + at) * size);
    }
};

// The hidden values [rows of x, ranks] of all adapters, laid out as the launcher's `Hidden`.
struct Hidden {
    const void* values;
    uint32_t* arrived; // null without adapters
    int ranks;         // 0 without adapters
    bool adapters_fp32;

    // The lane's four of those from `k` on; `row` of x.
    __device__ uint2 load(int row, int k) const {
        const uint16_t* of_row = static_cast<const uint16_t*>(values) + int64_t(row) * ranks;
        return *reinterpret_cast<const uint2*>(of_row + k + lane_id() % 4 * 4);
    }
};

// A product of eight rows of x and 16 of W: a lane's are one row of x and four of W, from lane % 4 * 4 on. Rows of x
// four apart, which two lanes beside each other have, lie in different banks where sums are kept.
__device__ inline int lane_token() { return lane_id() / 4 % 2 * 4 + lane_id() / 8; }

// The row of W, of those 16, of which a lane reads B for the i-th of two mmas.
__device__ inline int lane_row_of_b(int i) { return lane_id() / 8 * 4 + lane_id() / 4 % 2 + 2 * i; }

// Elements of B as memory holds them, of RANKS ranks and two rows.
struct RawB {
    uint32_t raw[2][4];

    // From element `k` on; zeros past the rows' ends.
    __device__ void load(const Share& share, bool fp32, const int (&rows)[2], int k) {
        if (fp32)
            load_as<uint32_t>(share, rows, k);
        else
            load_as<uint16_t>(share, rows, k);
    }

    template <typename Bits>
    __device__ void load_as(const Share& share, const int (&rows)[2], int k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Bits* row = static_cast<const Bits*>(share.b) + int64_t(rows[i]) * share.rank;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int at = k + lane_id() % 4 * 4 + e;
                raw[i][e] = at < share.rank ? row[at] : 0;
            }
        }
    }

    // As they enter the i-th mma.
    template <typename T>
    __device__ void operand(int i, bool fp32, uint32_t (&b)[2]) const {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const uint32_t first = raw[i][2 * pair], second = raw[i][2 * pair + 1];
            b[pair] = fp32 ? narrow2<T>(__uint_as_float(first), __uint_as_float(second)) : first | second << 16;
        }
    }
};
