// Tiles of more rows of x, whose scales enter the weights.
#pragma once
#include "tiles.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// TOKENS rows of x in bf16, many, by 128 rows of W.
template <int TOKENS>
struct Many {
    static constexpr int ROWS = 128, MULTIPLIERS = 256;
    static constexpr int STAGES = TOKENS == 256 ? 2 : 3;
    static constexpr int X_STAGES = TOKENS == 256 ? 3 : 6; // of 64 elements of K
    static constexpr int MANY_REGISTERS = 216, FEW_REGISTERS = 72;

    struct alignas(1024) Shared {
        union {
            struct {
                uint4 table[TABLE / 16];
                uint8_t codes[STAGES][ROWS][LINE / 2];
                uint8_t x[X_STAGES][TOKENS][128];
            };
            float sums[TOKENS][ROWS + 4];
        };
        float scales[STAGES][ROWS][BLOCKS];
        Barrier full[STAGES], empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES];
    };

    Shared& shared;
    const Part& part;
    const Table table;
    int row, token, first, last; // of out; lines [first, last) of K

    __device__ Many(Shared& shared, const Parts& parts, int splits, int lines)
        : shared(shared), part(parts.at[0]), table(shared.table), row(blockIdx.x / splits * ROWS),
          token(blockIdx.y * TOKENS), first(lines * int(blockIdx.x % splits) / splits),
          last(lines * int(blockIdx.x % splits + 1) / splits) {}

    // By one thread, before any other has come here.
    __device__ void begin() const {
        for (int i = 0; i < STAGES; ++i)
            shared.full[i].init(2), shared.empty[i].init(MULTIPLIERS / 32);
        for (int i = 0; i < X_STAGES; ++i)
            shared.x_full[i].init(1), shared.x_empty[i].init(MULTIPLIERS / 32);
        Barrier::publish();
        copy_codes(first, min(first + STAGES, last));
    }

    // By one thread.
    __device__ void copy_codes(int from, int to) const {
        for (int line = from; line < to; ++line) {
            const int i = line - first, stage = i % STAGES;
            shared.empty[stage].wait(i / STAGES % 2 ^ 1);
            shared.full[stage].arrive_expecting(sizeof shared.codes[stage]);
            copy_box(shared.codes[stage], &part.maps[0], line * (LINE / 2), row, shared.full[stage]);
        }
    }

    // By one thread.
    __device__ void copy_x(const Map& map) const {
        wait_for_previous_kernel();
        for (int block = 0; block < (last - first) * BLOCKS; ++block) {
            const int stage = block % X_STAGES;
            shared.x_empty[stage].wait(block / X_STAGES % 2 ^ 1);
            shared.x_full[stage].arrive_expecting(sizeof shared.x[stage]);
            copy_box(shared.x[stage], &map, first * LINE + block * 64, token, shared.x_full[stage]);
        }
    }

    // By a warp: scales, times `factor`.
    __device__ void decode_scales(int row_blocks, float factor) const {
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            uint32_t codes[ROWS / 32];
            float nested[ROWS / 32];
#pragma unroll
            for (int r = 0; r < ROWS / 32; ++r) {
                const uint32_t n = min(row + r * 32 + lane_id(), part.N - 1), at = n * row_blocks + line * BLOCKS;
                codes[r] = __ldg(reinterpret_cast<const uint32_t*>(part.absmax[0].codes + at));
                nested[r] = __ldg(part.absmax[0].absmax + at / 256);
            }
            shared.empty[stage].wait(i / STAGES % 2 ^ 1);
#pragma unroll
            for (int r = 0; r < ROWS / 32; ++r) {
                float v[BLOCKS];
#pragma unroll
                for (int j = 0; j < BLOCKS; ++j)
                    v[j] = __fadd_rn(__fmul_rn(table.scale(codes[r], j), nested[r]), part.absmax[0].offset) * factor;
                store16(shared.scales[stage][r * 32 + lane_id()], v);
            }
            release(shared.full[stage]);
        }
    }

    // Weights of one block are looked up while those of the block before it are multiplied.
    __device__ void multiply(float (&sum)[TOKENS / 2]) const {
        uint32_t a[2][4][4];
        for (int line = first; line < last; ++line) {
            const int i = line - first, stage = i % STAGES;
            shared.full[stage].wait(i / STAGES % 2);
            const float4 us = *reinterpret_cast<const float4*>(shared.scales[stage][lane_row()]);
            const float4 ls = *reinterpret_cast<const float4*>(shared.scales[stage][lane_row() + 8]);
            const float upper[BLOCKS] = {us.x, us.y, us.z, us.w}, lower[BLOCKS] = {ls.x, ls.y, ls.z, ls.w};
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                Block(shared.codes[stage], j)
                    .look_up([&](uint32_t word) { return weights(word, upper[j]); },
                             [&](uint32_t word) { return weights(word, lower[j]); }, a[j % 2]);
                if (j + 1 == BLOCKS)
                    release(shared.empty[stage]);
                const int block = i * BLOCKS + j;
                shared.x_full[block % X_STAGES].wait(block / X_STAGES % 2);
                hold(sum);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                const uint64_t b = swizzled_rows(shared.x[block % X_STAGES]);
#pragma unroll
                for (int step = 0; step < 4; ++step)
                    Wgmma<bf16, TOKENS>::run(sum, a[j % 2][step], b + step * 2, block > 0 || step > 0);
                asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (block > 0)
                    release(shared.x_empty[(block - 1) % X_STAGES]);
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(sum);
    }

    // The table holds fp16, which has more bits than a rounded weight of bf16.
    __device__ uint32_t weights(uint32_t word, float scale) const {
        const uint32_t pair = table.pair(word, lane_id() % 4);
        return narrow2<bf16>(widen(f16{uint16_t(pair)}) * scale, widen(f16{uint16_t(pair >> 16)}) * scale);
    }
};

template <int TOKENS>
__device__ void multiply_many(const Parts& parts, const Map& x_map, int M, int K, int splits, bool,
                              const Codebook& codebook, float gain) {
    using Tile = Many<TOKENS>;
    using Shared = typename Tile::Shared;
    extern __shared__ char dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + (-shared_address(dynamic) & 1023));
    let_next_kernel_start();
    const Tile tile(shared, parts, splits, K / LINE);
    const int job = int(threadIdx.x / 32) - Tile::MULTIPLIERS / 32; // below 0: multiplies
    if (job == 0 && lane_id() == 0)
        tile.begin();
    else if (job < 0)
        fill_tables<f16>(shared.table, Tile::MULTIPLIERS, parts, codebook, gain);
    __syncthreads();
    if (job < 0) {
        take_registers<Tile::MANY_REGISTERS>();
        float sum[TOKENS / 2];
        tile.multiply(sum);
        publish<TOKENS, Tile::ROWS>(shared.sums, sum, lane_row());
        cluster_sync();
        wait_for_previous_kernel();
        finish<bf16, TOKENS, Tile::ROWS>(shared.sums, nullptr, tile.part, tile.row, tile.token, M, splits, false, 1.0f);
    } else {
        give_up_registers<Tile::FEW_REGISTERS>();
        if (job == 0 && lane_id() == 0)
            tile.copy_codes(min(tile.first + Tile::STAGES, tile.last), tile.last);
        else if (job == 1 && lane_id() == 0)
            tile.copy_x(x_map);
        else if (job == 2)
            tile.decode_scales(K / 64, 1.0f / gain);
        __syncwarp();
        cluster_sync();
    }
    cluster_sync(); // the others may still be reading here
}

#else

template <int TOKENS>
__device__ void multiply_many(const Parts&, const Map&, int, int, int, bool, const Codebook&, float) {}

#endif
