// A row over the root of its mean square, times a weight: rounded once before the weight and once after it.
#pragma once
#include "memory.cuh"

__device__ inline float reciprocal_root(float squares, int columns, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(squares / float(columns) + eps));
}

template <typename T>
__device__ Raw8<T> scaled(const Raw8<T>& raw, float root) {
    float v[8];
    raw.unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        v[i] *= root;
    Raw8<T> out;
    out.pack(v);
    return out;
}

// In 16 bits the product of two is exact in fp32: rounding it once, as multiply2 does, is rounding it from there.
template <typename T, typename W>
__device__ Raw8<T> multiplied(const Raw8<T>& raw, const Raw8<W>& weight) {
    Raw8<T> out;
    if constexpr (sizeof(T) == 2 && sizeof(W) == 2) {
        out.words = make_uint4(multiply2<T>(raw.words.x, weight.words.x), multiply2<T>(raw.words.y, weight.words.y),
                               multiply2<T>(raw.words.z, weight.words.z), multiply2<T>(raw.words.w, weight.words.w));
    } else {
        float v[8], w[8];
        raw.unpack(v), weight.unpack(w);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            v[i] *= w[i];
        out.pack(v);
    }
    return out;
}
