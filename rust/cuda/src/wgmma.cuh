// What instructions of a warpgroup need beside themselves (sm_90a alone).
#pragma once
#include "pipeline.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A warpgroup's registers a thread, once the CTA's others have given up as many.
template <int COUNT>
__device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ void give_up_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Registers of sums, as operands of an instruction: eight from d[i] on, and lists of the first 16, 32, 64 and 128.
#define D8(i)                                                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define D64 D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
#define D128 D64, D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120)
#define S1 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define S2 S1 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define S3                                                                                                             \
    S2 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"                                              \
       ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define S4                                                                                                             \
    S3 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"                                              \
       ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"                                              \
       ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"                                  \
       ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// Rows of 128 bytes, whose 16-byte chunks are swizzled by the row's place among eight.
__device__ inline uint64_t swizzled_rows(const void* p) {
    return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

// The same of a transposed operand: the contraction goes down the rows, whose next 64 columns lie `bytes` further on.
__device__ inline uint64_t swizzled_columns(const void* p, int bytes) {
    return swizzled_rows(p) + (uint64_t(bytes / 16 - 1) << 16);
}

// The compiler may not move accesses to registers that wgmma is still writing.
template <int N>
__device__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+f"(d[i])::"memory");
}

#endif
