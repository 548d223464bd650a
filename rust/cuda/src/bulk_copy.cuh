// The warp of gemv_4bit_bulk that copies codes into the ring.
#pragma once
#include "bulk.cuh"
#include "memory.cuh"

#if HAS_ROOM

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

#endif
