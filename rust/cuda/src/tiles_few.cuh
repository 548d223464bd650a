// Tiles of up to 128 rows of x, whose scales enter the sums.
#pragma once
#include "tiles.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// TOKENS rows of x, few, by 64 * GROUPS rows of W.
template <typename T, int TOKENS, int GROUPS>
struct Few {
    static constexpr int ROWS = 64 * GROUPS, MULTIPLIERS = 128 * GROUPS, THREADS = MULTIPLIERS + 128;
    static constexpr int STAGES = GROUPS == 4 ? 2 : 3;
    static constexpr int X_STAGES = TOKENS > 64 ? 6 : GROUPS == 2 ? 12 : 8; // of 64 elements of K
    // A warp more could run a whole turn of the ring ahead, where parities repeat.
    static constexpr int SCALERS = STAGES;
    static constexpr int STRIP = GROUPS == 3 ? 96 : 128; // rows whose scales a warp decodes at once
    // Values of a second block are looked up while one is multiplied, where registers allow.
    static constexpr int BUFFERS = TOKENS * GROUPS >= 256 && GROUPS == 4 ? 1 : 2;
    // Of the registers that THREADS get at launch, those who multiply take most.
    static constexpr int MANY_REGISTERS = GROUPS == 2 ? 216 : GROUPS == 3 ? 152 : 112;
    static constexpr int FEW_REGISTERS = GROUPS == 4 ? 32 : 56;

    struct alignas(1024) Shared {
        union {
            struct {
                uint4 table[TABLE / 16];
                uint8_t codes[STAGES][ROWS][LINE / 2];
                uint8_t x[X_STAGES][TOKENS][128];
            };
            struct {
                float sums[TOKENS][ROWS + 4];
                float shares[TOKENS][ROWS + 4]; // of adapters in what the CTA finishes
            };
        };
        float scales[STAGES][ROWS][4];
        Barrier full[STAGES], empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES];
    };

    Shared& shared;
    const Part& part;
    const Table table;
    int row, second;        // of out and the first half's weight; of the second half's
    int token, first, last; // lines [first, last) of K

    __device__ Few(Shared& shared, const Parts& parts, int splits, int lines, bool gated)
        : shared(shared), part(part_of(parts, blockIdx.x / splits)), table(shared.table),
          row((int(blockIdx.x / splits) - part.first_tile) * (gated ? ROWS / 2 : ROWS)),
          second(gated ? row : row + ROWS / 2), token(blockIdx.y * TOKENS),
          first(lines * int(blockIdx.x % splits) / splits), last(lines * int(blockIdx.x % splits + 1) / splits) {}

    __device__ static void init(Shared& shared) {
        for (int i = 0; i < STAGES; ++i)
            shared.full[i].init(2), shared.empty[i].init(4 * GROUPS);
        for (int i = 0; i < X_STAGES; ++i)
            shared.x_full[i].init(1), shared.x_empty[i].init(4 * GROUPS);
        Barrier::publish();
    }

    // Beside adapters x is there before the launch in front, which makes the hidden values, has ended.
    __device__ static void wait_for_x(uint32_t* arrived) {
        if (arrived == nullptr) {
            wait_for_previous_kernel();
            return;
        }
        wait_for_announced_end(arrived, gridDim.x * gridDim.y);
        asm volatile("fence.proxy.async.global;" ::: "memory"); // the copy engine reads it
    }

    // By one thread, before any other has come here.
    __device__ void begin() const {
        init(shared);
        for (int line = first; line < min(first + STAGES, last); ++line)
            copy_codes(line);
    }

    __device__ void copy_codes(int line) const {
        const int stage = (line - first) % STAGES;
        shared.full[stage].arrive_expecting(sizeof shared.codes[stage]);
        copy_box(shared.codes[stage][0], &part.maps[0], line * (LINE / 2), row, shared.full[stage]);
        copy_box(shared.codes[stage][ROWS / 2], &part.maps[1], line * (LINE / 2), second, shared.full[stage]);
    }

    // By one thread: x, once it is there, and the codes that did not fit at first.
    __device__ void copy(const Map& x_map, uint32_t* arrived) const {
        wait_for_x(arrived);
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            if (i >= STAGES) {
                shared.empty[stage].wait(i / STAGES % 2 ^ 1);
                copy_codes(line);
            }
            for (int j = 0; j < 4; ++j) {
                const int block = i * 4 + j, x_stage = block % X_STAGES;
                shared.x_empty[x_stage].wait(block / X_STAGES % 2 ^ 1);
                shared.x_full[x_stage].arrive_expecting(sizeof shared.x[x_stage]);
                copy_box(shared.x[x_stage], &x_map, line * LINE + j * 64, token, shared.x_full[x_stage]);
            }
        }
    }

    // By a warp, for every SCALERS-th line from `turn` on.
    __device__ void decode_scales(int row_blocks, int turn) const {
        for (int line = first + turn; line < last; line += SCALERS) {
            const int i = line - first, stage = i % STAGES;
#pragma unroll
            for (int strip = 0; strip < ROWS; strip += STRIP) {
                uint32_t codes[STRIP / 32];
                float nested[STRIP / 32];
#pragma unroll
                for (int r = 0; r < STRIP / 32; ++r) {
                    const Absmax& absmax = part.absmax[is_second(strip + r * 32)];
                    const uint32_t at = weight_row(strip + r * 32) * row_blocks + line * 4;
                    codes[r] = __ldg(reinterpret_cast<const uint32_t*>(absmax.codes + at));
                    nested[r] = __ldg(absmax.absmax + at / 256);
                }
                if (strip == 0)
                    shared.empty[stage].wait(i / STAGES % 2 ^ 1);
#pragma unroll
                for (int r = 0; r < STRIP / 32; ++r) {
                    const float offset = part.absmax[is_second(strip + r * 32)].offset;
                    float v[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        v[j] = __fadd_rn(__fmul_rn(table.scale(codes[r], j), nested[r]), offset);
                    store16(shared.scales[stage][strip + r * 32 + lane_id()], v);
                }
            }
            release(shared.full[stage]);
        }
    }

    __device__ static bool is_second(int r) { return r >= ROWS / 2; }

    // The row of its weight that row r + lane of the tile is; the last one's instead of those past it.
    __device__ uint32_t weight_row(int r) const {
        return min((is_second(r) ? second - ROWS / 2 : row) + r + lane_id(), part.N - 1);
    }

    __device__ void multiply(float (&total)[TOKENS / 2]) const {
        float sum[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i)
            total[i] = 0;
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            shared.full[stage].wait(i / STAGES % 2);
            const float4 us = *reinterpret_cast<const float4*>(shared.scales[stage][lane_row()]);
            const float4 ls = *reinterpret_cast<const float4*>(shared.scales[stage][lane_row() + 8]);
            const float upper_scales[4] = {us.x, us.y, us.z, us.w}, lower_scales[4] = {ls.x, ls.y, ls.z, ls.w};
            uint32_t a[BUFFERS][4][4];
            if (BUFFERS > 1)
                look_up(stage, 0, a[0]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (BUFFERS == 1)
                    look_up(stage, j, a[0]);
                const int block = i * 4 + j, x_stage = block % X_STAGES;
                shared.x_full[x_stage].wait(block / X_STAGES % 2);
                hold(sum);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                const uint64_t b = swizzled_rows(shared.x[x_stage]);
#pragma unroll
                for (int step = 0; step < 4; ++step)
                    Wgmma<T, TOKENS>::run(sum, a[j % BUFFERS][step], b + step * 2, step > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (BUFFERS > 1 && j < 3)
                    look_up(stage, j + 1, a[(j + 1) % BUFFERS]);
                if (j + BUFFERS == 4)
                    release(shared.empty[stage]);
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                hold(sum);
                if (lane_id() == 0)
                    shared.x_empty[x_stage].arrive();
#pragma unroll
                for (int k = 0; k < TOKENS / 2; ++k)
                    total[k] = __fmaf_rn(k % 4 < 2 ? upper_scales[j] : lower_scales[j], sum[k], total[k]);
            }
        }
    }

    // Each warp that multiplies has sixteen rows of the tile for the adapters' shares, too.
    __device__ static int warp_row() { return threadIdx.x / 32 * 16; }
    __device__ const Share& own_share() const { return part.shares[is_second(warp_row())]; }

    // Of its weight, of which a lane reads B.
    __device__ void rows_of_b(int (&rows)[2]) const {
        const int first = (is_second(warp_row()) ? second - ROWS / 2 : row) + warp_row();
        for (int i = 0; i < 2; ++i)
            rows[i] = min(first + lane_row_of_b(i), part.N - 1);
    }

    // To L2, long before they are multiplied.
    __device__ void prefetch_b(const Hidden& hidden) const {
        int rows[2];
        rows_of_b(rows);
        own_share().prefetch(hidden.adapters_fp32, rows, 0);
    }

    // The adapters' shares in the rows of x that this CTA finishes.
    __device__ void multiply_hidden(const Hidden& hidden, int M, int splits) const {
        constexpr int PAIRS = TOKENS / 16; // of eights of rows of x
        const int share = share_of<TOKENS>(splits), from = blockIdx.x % splits * share;
        const int eights = min(share, TOKENS - from) / 8;
        const Share& own = own_share();
        int rows[2];
        rows_of_b(rows);
        float total[PAIRS][2][4] = {};
#pragma unroll 2
        for (int k = 0; k < own.rank; k += RANKS) {
            RawB raw;
            raw.load(own, hidden.adapters_fp32, rows, k);
            uint2 values[PAIRS][2] = {};
#pragma unroll
            for (int i = 0; i < 2 * PAIRS; ++i)
                if (i < eights)
                    values[i / 2][i % 2] = hidden.load(min(token + from + i * 8 + lane_token(), M - 1), own.column + k);
            uint32_t b[2][2];
            raw.operand<T>(0, hidden.adapters_fp32, b[0]);
            raw.operand<T>(1, hidden.adapters_fp32, b[1]);
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                const uint2(&of)[2] = values[i];
                const uint32_t a[4] = {of[0].x, of[1].x, of[0].y, of[1].y};
                multiply_add(T{}, total[i][0], a, b[0][0], b[0][1]);
                multiply_add(T{}, total[i][1], a, b[1][0], b[1][1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; ++i)
            if (const float (&of)[2][4] = total[i / 2]; i < eights)
                store16(&shared.shares[from + i * 8 + lane_token()][warp_row() + lane_id() % 4 * 4],
                        {of[0][i % 2 * 2], of[0][i % 2 * 2 + 1], of[1][i % 2 * 2], of[1][i % 2 * 2 + 1]});
    }

    __device__ void look_up(int stage, int block, uint32_t (&a)[4][4]) const {
        const auto pair = [&](uint32_t word) { return table.pair(word, lane_id() % 4); };
        Block(shared.codes[stage], block).look_up(pair, pair, a);
    }
};

template <typename T, int TOKENS, int GROUPS>
__device__ void multiply_few(const Parts& parts, const Map& x_map, int M, int K, int splits, bool gated,
                             const Codebook& codebook, float gain) {
    using Tile = Few<T, TOKENS, GROUPS>;
    using Shared = typename Tile::Shared;
    extern __shared__ char dynamic[];
    // Swizzling goes by addresses.
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + (-shared_address(dynamic) & 1023));
    let_next_kernel_start();
    const Tile tile(shared, parts, splits, K / LINE, gated);
    const int job = int(threadIdx.x / 32) - 4 * GROUPS; // below 0: multiplies
    if (job == 0 && lane_id() == 0)
        tile.begin();
    else if (job < 0) {
        fill_tables<T>(shared.table, Tile::MULTIPLIERS, parts, codebook, gain);
        tile.prefetch_b(parts.hidden);
    }
    __syncthreads();
    if (job < 0) {
        take_registers<Tile::MANY_REGISTERS>();
        float total[TOKENS / 2];
        tile.multiply(total);
        publish<TOKENS, Tile::ROWS>(shared.sums, total, lane_row());
        wait_for_previous_kernel();
        if (parts.hidden.ranks > 0)
            tile.multiply_hidden(parts.hidden, M, splits);
        cluster_sync();
        finish<T, TOKENS, Tile::ROWS>(shared.sums, shared.shares, tile.part, tile.row, tile.token, M, splits, gated,
                                      1.0f / gain);
    } else {
        give_up_registers<Tile::FEW_REGISTERS>();
        if (job == 0 && lane_id() == 0)
            tile.copy(x_map, parts.hidden.arrived);
        else if (job > 0 && job <= Tile::SCALERS)
            tile.decode_scales(K / 64, job - 1);
        __syncwarp();
        cluster_sync();
    }
    cluster_sync(); // the others may still be reading here
}

#else

template <typename T, int TOKENS, int GROUPS>
__device__ void multiply_few(const Parts&, const Map&, int, int, int, bool, const Codebook&, float) {}

#endif
