// Storage types and their conversions; all rounding is IEEE round-to-nearest-even.
#pragma once
#include <stdint.h>

struct f16 {
    uint16_t bits;
};

struct bf16 {
    uint16_t bits;
};

__device__ inline float widen(float value) { return value; }

__device__ inline float widen(f16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

__device__ inline float widen(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }

template <typename T>
__device__ T narrow(float value);

template <>
__device__ inline float narrow<float>(float value) {
    return value;
}

template <>
__device__ inline f16 narrow<f16>(float value) {
    f16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
    return half;
}

template <>
__device__ inline bf16 narrow<bf16>(float value) {
    bf16 half;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
#else
    const uint32_t bits = __float_as_uint(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    half.bits = value == value ? rounded : 0x7fff;
#endif
    return half;
}

// Two values as one register, `first` in the low half: the order of memory.
template <typename T>
__device__ uint32_t narrow2(float first, float second) {
    return narrow<T>(first).bits | uint32_t(narrow<T>(second).bits) << 16;
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline uint32_t narrow2<f16>(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

template <>
__device__ inline uint32_t narrow2<bf16>(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
#endif

// The halves of such a register.
template <typename T>
__device__ float low(uint32_t pair) {
    return widen(T{uint16_t(pair)});
}

template <typename T>
__device__ float high(uint32_t pair) {
    return widen(T{uint16_t(pair >> 16)});
}

template <>
__device__ inline float high<bf16>(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// What is left of a value once it has been stored as T.
template <typename T>
__device__ float rounded(float value) {
    return widen(narrow<T>(value));
}

// Two 16-bit values in one register, multiplied and added with one rounding each.
template <typename T>
__device__ uint32_t multiply2(uint32_t a, uint32_t b);
template <typename T>
__device__ uint32_t add2(uint32_t a, uint32_t b);

template <>
__device__ inline uint32_t multiply2<f16>(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

template <>
__device__ inline uint32_t add2<f16>(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

template <>
__device__ inline uint32_t multiply2<bf16>(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u)); // - 0
    return product;
#else
    const auto low = [](uint32_t pair) { return __uint_as_float(pair << 16); };
    const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
    return narrow2<bf16>(__fmul_rn(low(a), low(b)), __fmul_rn(high(a), high(b)));
#endif
}

template <>
__device__ inline uint32_t add2<bf16>(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b)); // a * 1
    return sum;
#else
    const auto low = [](uint32_t pair) { return __uint_as_float(pair << 16); };
    const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
    return narrow2<bf16>(__fadd_rn(low(a), low(b)), __fadd_rn(high(a), high(b)));
#endif
}

// `v` as an operation before this one has rounded it, and what stands beside it.
template <typename T>
__device__ void add_rounded(float (&v)[4], const float (&more)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        v[i] = rounded<T>(v[i]) + more[i];
}
