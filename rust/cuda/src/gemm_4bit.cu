// x Wᵀ of tens to hundreds of rows x on Hopper's warpgroup instructions, from the checkpoint's bytes.
//
// W is operand A of wgmma, out of registers: bytes become pairs of values in a table. x is operand B, out of shared
// memory, where the copy engine puts it. The CTAs of a cluster share a tile of out and split K; each adds up a part of
// their sums, in order.
//
// In a tile of few rows of x (tiles_few.cuh), scales enter the fp32 sums of a block, so that the only rounding of a
// weight is that of sixteen constants. The halves of such a tile may be rows of a gate and an up projection; then out
// is their SwiGLU. Biases and adapters' shares join the finished sums, each rounded as the operation of that name
// rounds it. The sums of many rows (tiles_many.cuh) fill the registers: there scales enter the weights, whose values in
// fp16 are rounded once more to the bf16 of x. x of fp16 would show the first rounding, so for it there are no such
// tiles.
#include "tiles_few.cuh"
#include "tiles_many.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_SIZE(shared_bytes, ...)                                                                                    \
    static_assert(sizeof(__VA_ARGS__::Shared) == shared_bytes, "the launcher asks for so much");
#else
#define HAS_SIZE(shared_bytes, ...)
#endif

// Maps: boxes of 128 bytes by the tile's rows of packed [N, K / 2], half of them where those of x are few, and by
// `tokens` rows of x [M, K], swizzled; nested absmax with one map for all and codes 4-byte aligned, blocks of 64, K %
// 256 == 0, N * K < 2^38; parts: unused ones begin past the last tile, many rows of x have one part and no gate; grid
// (tiles of W * splits, tiles of x), clusters of `splits`, at most K / 256 and MAX_SPLITS.
#define GEMM_4BIT(name, threads, multiply)                                                                             \
    extern "C" __global__ void __launch_bounds__(threads, 1)                                                           \
        gemm_4bit_##name(const __grid_constant__ Parts parts, const __grid_constant__ Map x_map, int M, int K,         \
                         int splits, bool gated, const __grid_constant__ Codebook codebook, float gain) {              \
        multiply(parts, x_map, M, K, splits, gated, codebook, gain);                                                   \
    }
#define GEMM_4BIT_FEW(T, dtype, tokens, groups, shared_bytes)                                                          \
    HAS_SIZE(shared_bytes, Few<T, tokens, groups>)                                                                     \
    GEMM_4BIT(tokens##x##groups##_##dtype, 128 * (groups + 1), (multiply_few<T, tokens, groups>))
#define GEMM_4BIT_MANY(tokens, shared_bytes)                                                                           \
    HAS_SIZE(shared_bytes, Many<tokens>)                                                                               \
    GEMM_4BIT(many_##tokens##_bf16, 384, multiply_many<tokens>)

#define GEMM_4BIT_TILES(T, dtype)                                                                                      \
    GEMM_4BIT_FEW(T, dtype, 32, 2, 171008)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 32, 3, 182272)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 32, 4, 173056)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 64, 2, 220160)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 64, 3, 215040)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 64, 4, 205824)                                                                             \
    GEMM_4BIT_FEW(T, dtype, 128, 2, 220160)

GEMM_4BIT_TILES(f16, f16)
GEMM_4BIT_TILES(bf16, bf16)
GEMM_4BIT_MANY(128, 220160)
GEMM_4BIT_MANY(256, 201728)
