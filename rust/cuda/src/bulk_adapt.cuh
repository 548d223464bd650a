// The warp of gemv_4bit_bulk that multiplies by adapters.
#pragma once
#include "bulk.cuh"

#if HAS_ROOM

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

#endif
