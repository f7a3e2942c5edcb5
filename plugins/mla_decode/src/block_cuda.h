// A thread block on the device, by the words that kernels.h is written in. block_host.h has the
// same words for a CPU.
//
//   each_warp(f)        f(warp) in every warp, then a barrier
//   PerWarp<State>      registers of a warp that live across barriers
//   Lanes               32 floats, one in each lane; PerLane<V>: 32 of anything
//   QueryMatrix, TokenMatrix, Sums   16 x 16 operands and fp32 sums of a matrix product
//   copy16, commit, wait             copies to shared memory that run beside arithmetic

#pragma once

#include "fragments.h"

namespace mla_decode
{

template <typename State>
class PerWarp
{
public:
    MLA_FN State& of(int) { return mState; }

private:
    State mState;
};

struct Lanes
{
    float value;

    static MLA_FN int lane() { return static_cast<int>(threadIdx.x & 31U); }

    template <typename F>
    static MLA_FN Lanes of(F const& f)
    {
        return Lanes{f(lane())};
    }

    template <typename F>
    MLA_FN void each(F const& f) const
    {
        f(lane(), value);
    }

    template <typename F>
    static MLA_FN void every(F const& f)
    {
        f(lane());
    }

    MLA_FN float at(int) const { return value; }

    MLA_FN float largest() const { return largest_of(32).value; }

    MLA_FN float total() const { return total_of(32).value; }

    // Of each `count` lanes beside one another, a power of two, in every one of them.
    MLA_FN Lanes largest_of(int count) const
    {
        float x = value;
#pragma unroll
        for (int step = count / 2; step > 0; step /= 2)
        {
            x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, step));
        }
        return Lanes{x};
    }

    MLA_FN Lanes total_of(int count) const
    {
        float x = value;
#pragma unroll
        for (int step = count / 2; step > 0; step /= 2)
        {
            x += __shfl_xor_sync(0xFFFFFFFFU, x, step);
        }
        return Lanes{x};
    }
};

template <typename V>
struct PerLane
{
    V value;

    template <typename F>
    static MLA_FN PerLane of(F const& f)
    {
        return PerLane{f(Lanes::lane())};
    }

    MLA_FN V const& at(int) const { return value; }
};

template <int WARPS>
class Block
{
public:
    template <typename F>
    MLA_FN void each_warp(F const& f)
    {
        f(static_cast<int>(threadIdx.x >> 5U));
        __syncthreads();
    }

    // Without the barrier, where what is written next is written behind a `wait`.
    template <typename F>
    MLA_FN void each_warp_open(F const& f)
    {
        f(static_cast<int>(threadIdx.x >> 5U));
    }

    // Before a lane writes what other lanes of its warp have read.
    MLA_FN void warp_barrier() { __syncwarp(); }

    // 16 bytes; zeros, and nothing is read, when not `valid`.
    MLA_FN void copy16(void* shared, void const* global, bool valid)
    {
        unsigned const to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 16 : 0));
    }

    MLA_FN void copy4(void* shared, void const* global, bool valid)
    {
        unsigned const to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 4 : 0));
    }

    MLA_FN void commit() { asm volatile("cp.async.commit_group;\n"); }

    // All copies are there, for every thread, and what was done before is done by all.
    MLA_FN void wait()
    {
        asm volatile("cp.async.wait_group 0;\n");
        __syncthreads();
    }
};

MLA_FN void load_matrices(unsigned (&to)[4], void const* shared)
{
    unsigned const from = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

MLA_FN void load_matrices_transposed(unsigned (&to)[4], void const* shared)
{
    unsigned const from = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

// Left operand: rows are query rows, columns what is summed over.
template <typename T>
struct QueryMatrix
{
    unsigned parts[4];

    // Of global memory; rows at and beyond `rows` are zeros and not read.
    MLA_FN void load_global(T const* at, int stride, int rows)
    {
        for (int part = 0; part < 4; ++part)
        {
            Place const p = left_pair(Lanes::lane(), part);
            T const* from = at + static_cast<size_t>(p.row) * stride + p.column;
            parts[part] = p.row < rows ? *reinterpret_cast<unsigned const*>(from) : 0U;
        }
    }

    MLA_FN void load_shared(T const* at, int stride)
    {
        Place const p = left_address(Lanes::lane());
        load_matrices(parts, at + p.row * stride + p.column);
    }
};

// Right operand, of shared memory that holds a token in each row.
template <typename T>
struct TokenMatrix
{
    unsigned parts[4];

    // 16 tokens give the columns; what is summed over lies along a token's row.
    MLA_FN void load_keys(T const* at, int stride)
    {
        Place const p = keys_address(Lanes::lane());
        load_matrices(parts, at + p.row * stride + p.column);
    }

    // The sum goes over 16 tokens; columns lie along a token's row.
    MLA_FN void load_values(T const* at, int stride)
    {
        Place const p = values_address(Lanes::lane());
        load_matrices_transposed(parts, at + p.row * stride + p.column);
    }
};

template <typename T>
MLA_FN void multiply8(float (&sum)[4], unsigned const (&a)[4], unsigned b0, unsigned b1);

template <>
MLA_FN void multiply8<__half>(float (&sum)[4], unsigned const (&a)[4], unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
MLA_FN void multiply8<__nv_bfloat16>(float (&sum)[4], unsigned const (&a)[4], unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 x 16 sums in fp32, as two halves of 16 x 8.
struct Sums
{
    float halves[2][4];

    MLA_FN void clear()
    {
        for (int i = 0; i < 8; ++i)
        {
            halves[i / 4][i % 4] = 0.0F;
        }
    }

    template <typename T>
    MLA_FN void add_product(QueryMatrix<T> const& a, TokenMatrix<T> const& b)
    {
        multiply8<T>(halves[0], a.parts, b.parts[0], b.parts[1]);
        multiply8<T>(halves[1], a.parts, b.parts[2], b.parts[3]);
    }

    MLA_FN void scale_rows(float const* factors)
    {
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            halves[i / 4][i % 4] *= factors[sum_pair(Lanes::lane(), i / 4, i % 4 / 2).row];
        }
    }

    // Rows at and beyond `rows` are left out.
    MLA_FN void store(float* at, size_t stride, int rows) const
    {
        for (int half = 0; half < 2; ++half)
        {
            for (int pair = 0; pair < 2; ++pair)
            {
                Place const p = sum_pair(Lanes::lane(), half, pair);
                if (p.row < rows)
                {
                    float2* to = reinterpret_cast<float2*>(at + p.row * stride + p.column);
                    *to = make_float2(halves[half][2 * pair], halves[half][2 * pair + 1]);
                }
            }
        }
    }
};

} // namespace mla_decode
