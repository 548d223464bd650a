// Vector loads and stores. Pointers are aligned to the whole access unless said otherwise.
#pragma once
#include "reduce.cuh"
#include "scalars.cuh"

// Weights are read once: they must not push x and the scales out of L1.
__device__ inline uint4 load_stream(const uint4* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}

__device__ inline void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ inline void load8(const float* p, float (&v)[8]) {
    const float4 a = reinterpret_cast<const float4*>(p)[0];
    const float4 b = reinterpret_cast<const float4*>(p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// Eight 16-bit values: one 16-byte load.
template <typename T>
__device__ void load8(const T* p, float (&v)[8]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = widen(T{uint16_t(words[i])});
        v[2 * i + 1] = widen(T{uint16_t(words[i] >> 16)});
    }
}

// x[first .. first+8) as fp32, zeros past n; any alignment unless `vector`.
template <typename T, typename Index>
__device__ void load8_or_zero(const T* x, Index first, Index n, bool vector, float (&v)[8]) {
    if (vector && first + 8 <= n)
        return load8(x + first, v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        v[i] = first + i < n ? widen(x[first + i]) : 0.0f;
}

// One 16-byte store: four fp32 or eight 16-bit values.
__device__ inline void store16(float* p, const float (&v)[4]) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}

template <typename T>
__device__ void store16(T* p, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(p) =
        make_uint4(narrow2<T>(v[0], v[1]), narrow2<T>(v[2], v[3]), narrow2<T>(v[4], v[5]), narrow2<T>(v[6], v[7]));
}

// Eight values as memory holds them: in 16 bits half the registers of their fp32.
template <typename T>
struct Raw8 {
    uint4 words;

    __device__ void unpack(float (&v)[8]) const {
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = widen(T{uint16_t(pairs[i])});
            v[2 * i + 1] = widen(T{uint16_t(pairs[i] >> 16)});
        }
    }

    __device__ void pack(const float (&v)[8]) {
        words =
            make_uint4(narrow2<T>(v[0], v[1]), narrow2<T>(v[2], v[3]), narrow2<T>(v[4], v[5]), narrow2<T>(v[6], v[7]));
    }

    __device__ void load(const T* p) { words = *reinterpret_cast<const uint4*>(p); }

    // As many as there are, zeros behind them; two at a time, which takes few registers.
    template <typename Index>
    __device__ void load_some(const T* p, Index count) {
#pragma unroll 1
        for (int i = 6; i >= 0; i -= 2) {
            const uint32_t low = i < count ? p[i].bits : 0, high = i + 1 < count ? p[i + 1].bits : 0;
            words = make_uint4(low | high << 16, words.x, words.y, words.z);
        }
    }

    __device__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = words; }

    // Keeps the compiler from holding unpacked values, twice the registers, until the next use.
    __device__ void stay_packed() { asm("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)); }
};

template <>
struct Raw8<float> {
    float4 low, high;

    __device__ void unpack(float (&v)[8]) const {
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }

    __device__ void pack(const float (&v)[8]) {
        low = make_float4(v[0], v[1], v[2], v[3]), high = make_float4(v[4], v[5], v[6], v[7]);
    }

    template <typename Index>
    __device__ void load_some(const float* p, Index count) {
        const auto at = [&](int i) { return i < count ? p[i] : 0.0f; };
        low = make_float4(at(0), at(1), at(2), at(3)), high = make_float4(at(4), at(5), at(6), at(7));
    }

    __device__ void load(const float* p) {
        low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
    }

    __device__ void store(float* p) const {
        reinterpret_cast<float4*>(p)[0] = low, reinterpret_cast<float4*>(p)[1] = high;
    }

    __device__ void stay_packed() {}
};

// As of one value: the largest of eight.
template <typename T>
__device__ uint32_t magnitude(const Raw8<T>& raw) {
    const uint32_t pairs[4] = {raw.words.x, raw.words.y, raw.words.z, raw.words.w};
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        largest = __vmaxu2(largest, pairs[i] & 0x7fff7fffu);
    return __float_as_uint(widen(T{uint16_t(max(largest >> 16, largest & 0xffffu))}));
}

__device__ inline uint32_t magnitude(const Raw8<float>& raw) {
    float v[8];
    raw.unpack(v);
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        largest = max(largest, magnitude(v[i]));
    return largest;
}

// x[first .. first+8), zeros past n; any alignment unless `vector`.
template <typename T, typename Index>
__device__ Raw8<T> load_raw8(const T* x, Index first, Index n, bool vector) {
    Raw8<T> raw{};
    if (vector && first + 8 <= n)
        raw.load(x + first);
    else
        raw.load_some(x + first, n - first);
    return raw;
}

// To y[first .. first+8), cut at n; any alignment unless `vector`.
template <typename T, typename Index>
__device__ void store_raw8(T* y, Index first, Index n, bool vector, const Raw8<T>& raw) {
    if (vector && first + 8 <= n)
        return raw.store(y + first);
    float v[8];
    raw.unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (first + i < n)
            y[first + i] = narrow<T>(v[i]);
}

template <typename T, typename Index>
__device__ void store8_inside(T* y, Index first, Index n, bool vector, const float (&v)[8]) {
    Raw8<T> raw;
    raw.pack(v);
    store_raw8(y, first, n, vector, raw);
}
