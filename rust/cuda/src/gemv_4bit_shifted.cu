// The product of gemv_4bit for x of 16 bits where rows of W begin at any of its codes, as where K is odd: blocks then
// straddle rows.
//
// Rows that begin at the same place of a block of 64 lie `period` apart, 64 where K is odd. A CTA has rows of one such
// place, so it may multiply the whole blocks that hold a row: x lies in shared memory behind as many zeros as the first
// of these blocks has codes of the row before, with zeros behind it. The rest is as in gemv_4bit_mma.
//
// Some warps share a panel of 16 rows, others take panels side by side; sums meet in shared memory in ascending order.
// Thus a row of out does not depend on the other rows of x.
#include "absmax.cuh"
#include "codes.cuh"
#include "memory.cuh"
#include "overlap.cuh"
#include "panel.cuh"

constexpr int MAX_WARPS = 16;

#if __CUDA_ARCH__ >= 800

constexpr int BLOCK = 64;
constexpr int BLOCKS = LINE / BLOCK; // of a line

// The rows of W that begin alike, in blocks of 64 of all codes.
struct Rows {
    const uint8_t* packed;
    Absmax absmax;
    int64_t bytes;  // of all codes
    uint32_t whole; // blocks of all codes
    int log2_ratio; // of a scale's block to these
    int count;
    uint32_t first, step, blocks; // where the first row begins, how far they are apart, blocks that hold a row

    // What one lane loads of a line of each of the rows g and g + 8 of a panel: codes, and the t-th block's scale.
    struct Item {
        uint4 codes[2][2];
        RawScale scale[2];
    };

    // This lane's half of a block; zeros past the last byte.
    __device__ uint4 load_codes(uint32_t block) const {
        const int64_t at = int64_t(block) * (BLOCK / 2) + lane_id() % 2 * 16;
        if (block < whole)
            return load_stream(reinterpret_cast<const uint4*>(packed + at));
        uint4 v{};
#pragma unroll 1
        for (int byte = min(bytes - at, int64_t(16)) - 1; byte >= 0; --byte) {
            v.w = v.w << 8 | v.z >> 24, v.z = v.z << 8 | v.y >> 24, v.y = v.y << 8 | v.x >> 24;
            v.x = v.x << 8 | packed[at + byte];
        }
        return v;
    }

    // Rows past the last repeat it, and so do blocks' scales.
    __device__ void load(Item& item, int panel, int line) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t row = first + min(panel * PANEL + g + 8 * r, count - 1) * step;
            item.codes[r][0] = load_codes(row + line * BLOCKS + t / 2);
            item.codes[r][1] = load_codes(row + line * BLOCKS + t / 2 + 2);
            item.scale[r] = load_scale(absmax, row + min(line * BLOCKS + t, blocks - 1) >> log2_ratio);
        }
    }

    __device__ float scale(RawScale raw, const Table& table) const {
        if (absmax.codes == nullptr)
            return raw.absmax;
        return __fadd_rn(__fmul_rn(table.scale(raw.code, 0), raw.absmax), absmax.offset);
    }
};

// total += W x of the `blocks` blocks of one line of a panel that there are. `x`: this lane's elements of the first, in
// the order of exchanged codes.
template <typename T>
__device__ void multiply_line(const Rows& rows, const Rows::Item& item, const uint4* x, int blocks, const Table& table,
                              float (&total)[4]) {
    const float upper = rows.scale(item.scale[0], table), lower = rows.scale(item.scale[1], table);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t codes[2][2][2]; // [row][block][word]
        exchange(item.codes[0][half], codes[0]);
        exchange(item.codes[1][half], codes[1]);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int block = 2 * half + side;
            if (block >= blocks)
                return;
            const uint4 b[2] = {x[block * 8], x[block * 8 + 1]};
            float sum[4] = {};
            multiply_block<T>(codes[0][side], codes[1][side], b, table, sum);
            add_scaled(total, __shfl_sync(FULL_WARP, upper, block, 4), __shfl_sync(FULL_WARP, lower, block, 4), sum);
        }
    }
}

// Rows of x as pairs behind `shift` zeros, with zeros up to whole blocks. Warps take rows side by side and have a batch
// of loads in flight, the first of them while something else is done.
template <typename T, typename Meanwhile>
__device__ void keep_x(const T* x, int rows, int K, int shift, int pairs, int pitch, uint32_t* kept,
                       const Meanwhile& meanwhile) {
    constexpr int BATCH = 16;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32 / rows, m = warp % rows, step = 32 * warps;
    const int last = warp < warps * rows ? pairs : 0;
    x += int64_t(m) * K, kept += m * (pitch / 2);
    const auto bits = [&](int k) { return uint32_t(k) < uint32_t(K) ? uint32_t(x[k].bits) : 0u; };
    uint32_t batch[BATCH];
    const auto load = [&](int first) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int k = 2 * (first + i * step) - shift;
            batch[i] = bits(k) | bits(k + 1) << 16;
        }
    };
    const auto store = [&](int first) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (const int pair = first + i * step; pair < last)
                kept[pair] = batch[i];
    };
    int first = warp / rows * 32 + lane_id();
    load(first);
    meanwhile();
    store(first);
#pragma unroll 1
    for (first += BATCH * step; first < last; first += BATCH * step)
        load(first), store(first);
}

template <typename T>
__device__ void gemv_shifted(const T* x, const uint8_t* packed, const Absmax& absmax, T* out, int rows_x, int N, int K,
                             int log2_blocksize, int quant_type, int period, int panel_warps, int tile, int pitch) {
    extern __shared__ uint4 shared[]; // the table, sums [2][warps][PARTIAL], x [tile][pitch]
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane_id() / 4, t = lane_id() % 4;
    float* sums = reinterpret_cast<float*>(shared + TABLE / sizeof(uint4));
    uint4* kept = reinterpret_cast<uint4*>(sums + 2 * warps * PARTIAL);

    // This CTA's panels: `begin`, `begin` + `splits`, ... of the rows `place`, `place` + `period`, ...
    const int places = min(period, N), place = blockIdx.x % places, begin = blockIdx.x / places;
    const int splits = gridDim.x / places, shift = int64_t(place) * K % BLOCK;
    const Rows rows{packed,
                    absmax,
                    (int64_t(N) * K + 1) / 2,
                    uint32_t(int64_t(N) * K / BLOCK),
                    log2_blocksize - 6,
                    (N - place + period - 1) / period,
                    uint32_t(int64_t(place) * K / BLOCK),
                    uint32_t(int64_t(period) * K / BLOCK),
                    uint32_t(shift + K + BLOCK - 1) / BLOCK};
    const int panels = (rows.count + PANEL - 1) / PANEL, lines = (rows.blocks + BLOCKS - 1) / BLOCKS;
    // This warp's: one of every `sides` of them, every `panel_warps`-th line.
    const int sides = warps / panel_warps, side = warp / panel_warps, part = warp % panel_warps;
    const int stride = sides * splits;
    int panel = side < sides ? begin + side * splits : panels;

    Rows::Item next;
    if (panel < panels)
        rows.load(next, panel, part);
    const bool nested = absmax.codes != nullptr;
    const float of_code = nested ? __ldg(absmax.map + threadIdx.x % 256) : 0.0f;
    const float gain = table_gain<T>(quant_type), entry = CODEBOOK_4BIT[quant_type][lane_id() % 16] * gain;
    wait_for_previous_kernel();
    x += int64_t(blockIdx.y) * tile * K, out += int64_t(blockIdx.y) * tile * N;
    rows_x = min(rows_x - int(blockIdx.y) * tile, tile);
    keep_x(x, rows_x, K, shift, rows.blocks * (BLOCK / 2), pitch, reinterpret_cast<uint32_t*>(kept), [&] {
        if (const int b = threadIdx.x; b < 256) {
            fill_row(shared, 0, b, narrow2<T>(lookup16(entry, b >> 4), lookup16(entry, b)));
            fill_row(shared, 1, b, __float_as_uint(of_code));
        }
    });
    __syncthreads();

    const Table table = Table::first(shared);
    const uint4* x_lane = kept + ((g < rows_x ? g : 0) * pitch + 32 * (t % 2) + 16 * (t / 2)) / 8;
#pragma unroll 1
    for (int first = begin; first < panels; first += stride, panel += stride) {
        float total[4] = {};
#pragma unroll 1
        for (int line = part; line < lines && panel < panels; line += panel_warps) {
            const Rows::Item item = next;
            const bool same = line + panel_warps < lines;
            if (const int next_panel = same ? panel : panel + stride; next_panel < panels)
                rows.load(next, next_panel, same ? line + panel_warps : part);
            multiply_line<T>(rows, item, x_lane + line * (LINE / 8), rows.blocks - line * BLOCKS, table, total);
        }
        // Two buffers: the next panels' sums are stored while these are still being read.
        store_partial(sums + warp * PARTIAL, total);
        __syncthreads();
        for (int e = threadIdx.x; e < sides * PARTIAL; e += blockDim.x) {
            const int of = e / PARTIAL, i = (first + of * splits) * PANEL + e % PARTIAL / TILE, m = e % TILE;
            if (m >= rows_x || i >= rows.count)
                continue;
            const float* from = sums + of * panel_warps * PARTIAL + e % PARTIAL;
            float sum = 0;
#pragma unroll 4
            for (int w = 0; w < panel_warps; ++w)
                sum += from[w * PARTIAL];
            out[int64_t(m) * N + place + int64_t(i) * period] = narrow<T>(sum * (1.0f / gain));
        }
        const int64_t other = warps * PARTIAL;
        sums += (first - begin) / stride % 2 ? -other : other;
    }
}

#else

template <typename T>
__device__ void gemv_shifted(const T*, const uint8_t*, const Absmax&, T*, int, int, int, int, int, int, int, int, int) {
}

#endif

// x [rows_x, K], packed [ceil(N * K / 2)] 16-byte aligned, blocks of 64 or more, N * K < 2^38; period 64 / gcd(K, 64);
// 8 to MAX_WARPS warps, panel_warps of which share a panel; pitch the elements of all lines of a row and 8; splits *
// min(period, N) by tiles of x CTAs; dynamic shared memory TABLE + 2 * warps * PARTIAL * 4 + tile * pitch * 2.
#define GEMV_4BIT_SHIFTED(T, dtype)                                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1) gemv_4bit_shifted_##dtype(                         \
        const T* x, const uint8_t* packed, Absmax absmax, T* out, int rows_x, int N, int K, int log2_blocksize,        \
        int quant_type, int period, int panel_warps, int tile, int pitch) {                                            \
        gemv_shifted(x, packed, absmax, out, rows_x, N, K, log2_blocksize, quant_type, period, panel_warps, tile,      \
                     pitch);                                                                                           \
    }

GEMV_4BIT_SHIFTED(f16, f16)
GEMV_4BIT_SHIFTED(bf16, bf16)
