// Element types: to float and back, and how a row is coded in 8 bits. Compiled for the device and,
// for the check without one, for the host; CUDA's own headers do both.

#pragma once

#include <cmath>
#include <cstdint>

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
};

struct Fp8
{
    using Stored = uint8_t; // e4m3: no infinity, largest 448
    static constexpr bool kCODED = true;
    static constexpr float kLARGEST = 448.0F;
    static MLA_FN uint8_t encode(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
    static MLA_FN float decode(uint8_t q) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(q, __NV_E4M3))); }
};

} // namespace mla_decode
