// A thread block on a CPU, by the same words as block_cuda.h, so that kernels.h computes its
// numbers where there is no device. Warps run one after the other between barriers: a kernel that
// is right must give the same bits in either order, and whether a copy to shared memory happens
// when it is asked for or as late as `wait` allows. Operands lie in lanes as the device has them.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "fragments.h"

namespace mla_decode
{

struct Lanes
{
    float values[32];

    template <typename F>
    static Lanes of(F const& f)
    {
        Lanes made{};
        for (int lane = 0; lane < 32; ++lane)
        {
            made.values[lane] = f(lane);
        }
        return made;
    }

    template <typename F>
    void each(F const& f) const
    {
        for (int lane = 0; lane < 32; ++lane)
        {
            f(lane, values[lane]);
        }
    }

    template <typename F>
    static void every(F const& f)
    {
        for (int lane = 0; lane < 32; ++lane)
        {
            f(lane);
        }
    }

    float at(int lane) const { return values[lane]; }

    float largest() const { return largest_of(32).values[0]; }

    float total() const { return total_of(32).values[0]; }

    Lanes largest_of(int count) const
    {
        return paired(count, [](float a, float b) { return std::max(a, b); });
    }

    Lanes total_of(int count) const
    {
        return paired(count, [](float a, float b) { return a + b; });
    }

private:
    // In the device's order of pairs.
    template <typename F>
    Lanes paired(int count, F const& join) const
    {
        Lanes made = *this;
        for (int step = count / 2; step > 0; step /= 2)
        {
            Lanes const before = made;
            for (int lane = 0; lane < 32; ++lane)
            {
                made.values[lane] = join(before.values[lane], before.values[lane ^ step]);
            }
        }
        return made;
    }
};

template <typename V>
struct PerLane
{
    V values[32];

    template <typename F>
    static PerLane of(F const& f)
    {
        PerLane made{};
        for (int lane = 0; lane < 32; ++lane)
        {
            made.values[lane] = f(lane);
        }
        return made;
    }

    V const& at(int lane) const { return values[lane]; }
};

struct Order
{
    bool reversed; // warps from the last to the first
    bool late;     // copies when they are waited for
};

template <int WARPS>
class Block
{
public:
    explicit Block(Order order) : mOrder{order} {}

    template <typename F>
    void each_warp(F const& f)
    {
        for (int i = 0; i < WARPS; ++i)
        {
            f(mOrder.reversed ? WARPS - 1 - i : i);
        }
    }

    template <typename F>
    void each_warp_open(F const& f)
    {
        each_warp(f);
    }

    void warp_barrier() {}

    void copy16(void* shared, void const* global, bool valid) { copy({shared, global, valid ? 16 : 0, 16}); }

    void copy4(void* shared, void const* global, bool valid) { copy({shared, global, valid ? 4 : 0, 4}); }

    void commit()
    {
        mGroups.push_back(mOpen);
        mOpen.clear();
    }

    void wait()
    {
        for (std::vector<Copy> const& group : mGroups)
        {
            for (Copy const& one : group)
            {
                one.run();
            }
        }
        mGroups.clear();
    }

private:
    struct Copy
    {
        void* to;
        void const* from;
        int read;
        int written;

        void run() const
        {
            std::memset(to, 0, static_cast<size_t>(written));
            std::memcpy(to, from, static_cast<size_t>(read));
        }
    };

    void copy(Copy one)
    {
        if (mOrder.late)
        {
            mOpen.push_back(one);
        }
        else
        {
            one.run();
        }
    }

    Order mOrder;
    std::vector<Copy> mOpen;
    std::vector<std::vector<Copy>> mGroups;
};

// A warp's registers are kept for each warp in turn.
template <typename State>
class PerWarp
{
public:
    State& of(int warp) { return mStates[warp]; }

private:
    State mStates[8];
};

// ldmatrix: row r of matrix m is where lane 8 m + r points, and a lane gets a pair of each matrix.
template <typename T, typename F>
void load_matrices(T (&to)[32][4][2], F const& address, bool transposed)
{
    for (int lane = 0; lane < 32; ++lane)
    {
        for (int part = 0; part < 4; ++part)
        {
            for (int i = 0; i < 2; ++i)
            {
                int const row = transposed ? 2 * (lane % 4) + i : lane / 4;
                int const column = transposed ? lane / 4 : 2 * (lane % 4) + i;
                to[lane][part][i] = address(8 * part + row)[column];
            }
        }
    }
}

template <typename T>
struct QueryMatrix
{
    T parts[32][4][2];

    void load_global(T const* at, int stride, int rows)
    {
        for (int lane = 0; lane < 32; ++lane)
        {
            for (int part = 0; part < 4; ++part)
            {
                Place const p = left_pair(lane, part);
                for (int i = 0; i < 2; ++i)
                {
                    T const* from = at + static_cast<size_t>(p.row) * stride + p.column + i;
                    parts[lane][part][i] = p.row < rows ? *from : Number<T>::narrow(0.0F);
                }
            }
        }
    }

    void load_shared(T const* at, int stride)
    {
        load_matrices(parts, [&](int lane) { return at + left_address(lane).row * stride + left_address(lane).column; },
            false);
    }
};

template <typename T>
struct TokenMatrix
{
    T parts[32][4][2];

    void load_keys(T const* at, int stride)
    {
        load_matrices(parts, [&](int lane) { return at + keys_address(lane).row * stride + keys_address(lane).column; },
            false);
    }

    void load_values(T const* at, int stride)
    {
        load_matrices(parts,
            [&](int lane) { return at + values_address(lane).row * stride + values_address(lane).column; }, true);
    }
};

struct Sums
{
    float halves[32][2][4];

    void clear() { std::memset(halves, 0, sizeof(halves)); }

    // mma.m16n8k16 for both halves, operands and sums found by its tables.
    template <typename T>
    void add_product(QueryMatrix<T> const& a, TokenMatrix<T> const& b)
    {
        float left[16][16];
        float right[16][16];
        float sums[16][16] = {};
        for (int lane = 0; lane < 32; ++lane)
        {
            int const group = lane / 4;
            for (int part = 0; part < 4; ++part)
            {
                for (int i = 0; i < 2; ++i)
                {
                    int const pair = 2 * (lane % 4) + i;
                    left[group + 8 * (part % 2)][pair + 8 * (part / 2)] = Number<T>::wide(a.parts[lane][part][i]);
                    right[pair + 8 * (part % 2)][group + 8 * (part / 2)] = Number<T>::wide(b.parts[lane][part][i]);
                }
            }
        }
        for (int r = 0; r < 16; ++r)
        {
            for (int k = 0; k < 16; ++k)
            {
                for (int c = 0; c < 16; ++c)
                {
                    sums[r][c] += left[r][k] * right[k][c];
                }
            }
        }
        for (int lane = 0; lane < 32; ++lane)
        {
            for (int i = 0; i < 8; ++i)
            {
                int const row = lane / 4 + 8 * (i % 4 / 2);
                int const column = 2 * (lane % 4) + i % 2 + 8 * (i / 4);
                halves[lane][i / 4][i % 4] += sums[row][column];
            }
        }
    }

    void scale_rows(float const* factors)
    {
        for (int lane = 0; lane < 32; ++lane)
        {
            for (int i = 0; i < 8; ++i)
            {
                halves[lane][i / 4][i % 4] *= factors[sum_pair(lane, i / 4, i % 4 / 2).row];
            }
        }
    }

    void store(float* at, size_t stride, int rows) const
    {
        for (int lane = 0; lane < 32; ++lane)
        {
            for (int i = 0; i < 8; ++i)
            {
                Place const p = sum_pair(lane, i / 4, i % 4 / 2);
                if (p.row < rows)
                {
                    at[p.row * stride + p.column + i % 2] = halves[lane][i / 4][i % 4];
                }
            }
        }
    }
};

} // namespace mla_decode
