// Element types: to float and back, and how a row is coded in 8 bits. Compiled for the device and,
// for the check without one, for the host; CUDA's own headers do both.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#ifdef __CUDACC__
#define MLA_FN __device__ __forceinline__
#else
#define MLA_FN inline
#endif

namespace mla_decode
{

template <typename T>
struct Number;

template <>
struct Number<__half>
{
    static MLA_FN float wide(__half x) { return __half2float(x); }
    static MLA_FN __half narrow(float x) { return __float2half_rn(x); }
};

template <>
struct Number<__nv_bfloat16>
{
    static MLA_FN float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
    static MLA_FN __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

// N numbers beside one another, read and written at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Few
{
    T of[N];

    static MLA_FN Few at(T const* from) { return *reinterpret_cast<Few const*>(from); }
    MLA_FN void put(T* to) const { *reinterpret_cast<Few*>(to) = *this; }
};

constexpr int kDecoded = 8; // codes that are widened at once

// A float of these bits.
MLA_FN float float_of(unsigned bits)
{
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float made = 0.0F;
    std::memcpy(&made, &bits, sizeof(made));
    return made;
#endif
}

// 2^x, and 0 where that is no normal number: to 2 units of the last place.
MLA_FN float power_of_2(float x)
{
#ifdef __CUDA_ARCH__
    float made;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
    return made;
#else
    return exp2f(x);
#endif
}

// Byte `i` of a word as the low byte of 2^23: that float less 2^23 is the byte.
MLA_FN unsigned behind_2_23(unsigned word, unsigned i)
{
#ifdef __CUDA_ARCH__
    return __byte_perm(word, 0x4B000000U, 0x7440U + i);
#else
    return 0x4B000000U | ((word >> (8 * i)) & 0xFFU);
#endif
}

// A coding says what is stored for x / scale, and the largest of it.
template <typename T>
struct Plain
{
    using Stored = T;
    static constexpr bool kCODED = false;
};

struct Int8
{
    using Stored = int8_t;
    static constexpr bool kCODED = true;
    static constexpr float kLARGEST = 127.0F;
    static MLA_FN int8_t encode(float x) { return static_cast<int8_t>(fminf(fmaxf(rintf(x), -127.0F), 127.0F)); }
    static MLA_FN float decode(int8_t q) { return static_cast<float>(q); }

    // Without the conversion of integers, which is slow on 8.x: a code and 128 is a byte, exactly.
    static MLA_FN void widen(void const* codes, float (&to)[kDecoded])
    {
        uint2 const words = *static_cast<uint2 const*>(codes);
#pragma unroll
        for (unsigned i = 0; i < kDecoded; ++i)
        {
            to[i] = float_of(behind_2_23((i < 4 ? words.x : words.y) ^ 0x80808080U, i % 4)) - 8388736.0F;
        }
    }
};

struct Fp8
{
    using Stored = uint8_t; // e4m3: no infinity, largest 448
    static constexpr bool kCODED = true;
    static constexpr float kLARGEST = 448.0F;
    static MLA_FN uint8_t encode(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
    static MLA_FN float decode(uint8_t q) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(q, __NV_E4M3))); }

    // In pairs, as devices from 8.9 on convert them.
    static MLA_FN void widen(void const* codes, float (&to)[kDecoded])
    {
        uint2 const words = *static_cast<uint2 const*>(codes);
#pragma unroll
        for (int i = 0; i < kDecoded; i += 2)
        {
            auto const pair = static_cast<__nv_fp8x2_storage_t>((i < 4 ? words.x : words.y) >> (8 * (i % 4)));
            float2 const wide = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
            to[i] = wide.x;
            to[i + 1] = wide.y;
        }
    }
};

} // namespace mla_decode
