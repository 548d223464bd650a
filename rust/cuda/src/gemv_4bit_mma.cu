// The product of gemv_4bit for x of 16 bits, on tensor cores and from the checkpoint's bytes.
//
// W is operand A of mma.m16n8k16. A table in shared memory turns a byte of two codes into one register of two 16-bit
// values; it holds each of its entries once for every lane, so that no two lanes ever want the same bank. The
// contraction is permuted so that a lane's packed bytes feed A as they lie, and x is read in the same order. Scales
// enter the fp32 sums, once per block and row.
//
// The warps of a CTA split K and share panels of 16 rows of W; their sums meet in shared memory in ascending order.
// Thus a row of out depends neither on the other rows of x nor on the number of CTAs.
#include "absmax.cuh"
#include "codes.cuh"
#include "memory.cuh"
#include "overlap.cuh"
#include "panel.cuh"

constexpr int MAX_WARPS = 16;

#if __CUDA_ARCH__ >= 800

constexpr int MAX_CHUNK = 4; // panels that share the fragments of x which a warp holds

// W in lines: 256 weights of a row, four blocks.
struct Weight {
    const uint4* packed;
    Absmax absmax;
    uint32_t N, lines; // rows, lines of a row

    // What one lane loads of a line of each of the rows g and g + 8 of a panel.
    struct Item {
        uint4 codes[2][2];
        uint32_t scale_codes[2];
        float absmax[2];
    };

    // Rows past the last repeat it.
    __device__ uint32_t line_of(int panel, int row, int line) const {
        return min(uint32_t(panel * PANEL + row), N - 1) * lines + line;
    }

    __device__ void prefetch(int panel, int line) const {
        if (lane_id() < PANEL)
            prefetch_l2(packed + uint64_t(line_of(panel, lane_id(), line)) * 8);
    }

    __device__ void load(Item& item, int panel, int line) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t i = line_of(panel, lane_id() / 4 + 8 * r, line);
            const uint4* p = packed + uint64_t(i) * 8 + lane_id() % 4;
            item.codes[r][0] = load_stream(p);
            item.codes[r][1] = load_stream(p + 4);
            item.scale_codes[r] = __ldg(reinterpret_cast<const uint32_t*>(absmax.codes) + i);
            item.absmax[r] = __ldg(absmax.absmax + i / 64);
        }
    }

    __device__ float scale(const Item& item, int r, int block, const Table& table) const {
        return __fadd_rn(__fmul_rn(table.scale(item.scale_codes[r], block), item.absmax[r]), absmax.offset);
    }
};

// total += W x of one line of a panel. `b`: the line's x, 16 elements of each of four blocks.
template <typename T>
__device__ void multiply_line(const Weight& weight, const Weight::Item& item, const uint4 (&b)[4][2],
                              const Table& table, float (&total)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t codes[2][2][2]; // [row][block][word]
        exchange(item.codes[0][half], codes[0]);
        exchange(item.codes[1][half], codes[1]);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int block = 2 * half + side;
            float sum[4] = {};
            multiply_block<T>(codes[0][side], codes[1][side], b[block], table, sum);
            const float upper = weight.scale(item, 0, block, table), lower = weight.scale(item, 1, block, table);
            add_scaled(total, upper, lower, sum);
        }
    }
}

// out of `panels` panels from `first` on, from the sums [panel][warp][row][row of x].
template <typename T>
__device__ void reduce_panels(const float* sums, T* out, int first, int panels, int rows_x, int64_t N, float factor) {
    const int warps = blockDim.x / 32;
    for (int e = threadIdx.x; e < panels * PARTIAL; e += blockDim.x) {
        const int64_t n = int64_t(first) * PANEL + e / TILE;
        const int m = e % TILE;
        if (m >= rows_x || n >= N)
            continue;
        const float* from = sums + e / PARTIAL * warps * PARTIAL + e % PARTIAL;
        float sum = 0;
#pragma unroll 8
        for (int warp = 0; warp < warps; ++warp)
            sum += from[warp * PARTIAL];
        out[m * N + n] = narrow<T>(sum * factor);
    }
}

template <typename T>
__device__ void gemv_mma(const T* x, const uint8_t* packed, const Absmax& absmax, T* out, int rows_x, int N, int K,
                         int quant_type) {
    // More would spill registers.
    constexpr int CHUNK = __CUDA_ARCH__ < 1000 ? MAX_CHUNK : 2;
    extern __shared__ uint4 shared[]; // the table, then sums [2][CHUNK][warps][PARTIAL]
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane_id() / 4, t = lane_id() % 4;
    const Weight weight{reinterpret_cast<const uint4*>(packed), absmax, uint32_t(N), uint32_t(K / LINE)};
    // Lines of this warp: [line, line_end).
    const int each = (K / LINE + warps - 1) / warps, line_first = warp * each;
    const int line_end = min(line_first + each, K / LINE);
    // Panels of this CTA: [first, last).
    const int panels = (N + PANEL - 1) / PANEL, share = panels / gridDim.x, rest = panels % gridDim.x;
    const int first = blockIdx.x * share + min(int(blockIdx.x), rest), last = first + share + (int(blockIdx.x) < rest);

    for (int panel = first; panel < min(first + 2, last); ++panel)
        weight.prefetch(panel, line_first);
    const float gain = table_gain<T>(quant_type), entry = CODEBOOK_4BIT[quant_type][lane_id() % 16] * gain;
    fill_table(shared, 0, blockDim.x, [&](int b) { return narrow2<T>(lookup16(entry, b >> 4), lookup16(entry, b)); });
    wait_for_previous_kernel();

    Weight::Item next;
    if (first < last)
        weight.load(next, first, line_first);
    fill_table(shared, 1, blockDim.x, [&](int b) { return __float_as_uint(__ldg(absmax.map + b)); });
    __syncthreads();

    const Table table = Table::first(shared);
    float* sums = reinterpret_cast<float*>(shared + TABLE / sizeof(uint4));
    // This lane's elements of a block of x, in the order of exchanged codes; zeros where x has no row.
    rows_x -= blockIdx.y * TILE, x += int64_t(blockIdx.y) * TILE * K, out += int64_t(blockIdx.y) * TILE * N;
    const bool has_row = g < rows_x;
    const uint4* x_lane =
        reinterpret_cast<const uint4*>(x + int64_t(has_row ? g : 0) * K + 32 * (t % 2) + 16 * (t / 2));

    for (int chunk = first; chunk < last; chunk += CHUNK) {
        float total[CHUNK][4] = {};
        for (int line = line_first; line < line_end; ++line) {
            uint4 b[4][2];
#pragma unroll
            for (int block = 0; block < 4; ++block)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    b[block][i] = has_row ? __ldg(x_lane + line * (LINE / 8) + block * 8 + i) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int p = 0; p < CHUNK; ++p) {
                if (chunk + p >= last)
                    break;
                const Weight::Item item = next;
                const bool same_line = p + 1 < CHUNK && chunk + p + 1 < last,
                           same_chunk = same_line || line + 1 < line_end;
                const int next_panel = same_line || !same_chunk ? chunk + p + 1 : chunk;
                if (next_panel < last)
                    weight.load(next, next_panel, same_line ? line : same_chunk ? line + 1 : line_first);
                multiply_line<T>(weight, item, b, table, total[p]);
            }
        }
        // Two buffers: the next chunk's sums are stored while these are still being read.
#pragma unroll
        for (int p = 0; p < CHUNK; ++p)
            store_partial(sums + (p * warps + warp) * PARTIAL, total[p]);
        __syncthreads();
        reduce_panels(sums, out, chunk, min(CHUNK, last - chunk), rows_x, N, 1.0f / gain);
        const int64_t other = CHUNK * warps * PARTIAL;
        sums += (chunk - first) / CHUNK % 2 ? -other : other;
    }
}

#else

template <typename T>
__device__ void gemv_mma(const T*, const uint8_t*, const Absmax&, T*, int, int, int, int) {}

#endif

// x [rows_x, K] and packed [N * K / 2] 16-byte aligned, nested absmax with codes 4-byte aligned, blocks of 64,
// K % 256 == 0, N * K < 2^40; grid (any, tiles of x); dynamic shared memory TABLE + 2 * MAX_CHUNK * warps * PARTIAL
// * 4.
#define GEMV_4BIT_MMA(T, dtype)                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1) gemv_4bit_mma_##dtype(                             \
        const T* x, const uint8_t* packed, Absmax absmax, T* out, int rows_x, int N, int K, int quant_type) {          \
        gemv_mma(x, packed, absmax, out, rows_x, N, K, quant_type);                                                    \
    }

GEMV_4BIT_MMA(f16, f16)
GEMV_4BIT_MMA(bf16, bf16)
