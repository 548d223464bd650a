// The product of gemv_4bit for x of 16 bits where bulk copies exist: W streams through a ring in shared memory.
//
// As in gemv_4bit_mma, W is operand A of mma.m16n8k16, bytes become pairs of values in a table, and scales enter the
// fp32 sums. But here every warp has one job, and barriers in shared memory are all that connects them: one warp
// copies codes, one decodes scales, sixteen multiply, one multiplies by the adapters' B, one adds up what they made,
// each in a file of its own: bulk_*.cuh. So memory is read without a pause while the table, which is what bounds the
// kernel, is never without work. For nine to sixteen rows of x every pair of values feeds two mmas; eight warps have
// registers for twice the x, and two add up.
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
#include "bulk.cuh"
#include "bulk_adapt.cuh"
#include "bulk_copy.cuh"
#include "bulk_finish.cuh"
#include "bulk_hidden.cuh"
#include "bulk_multiply.cuh"
#include "bulk_scales.cuh"
#include "codes.cuh"

#if HAS_ROOM

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
