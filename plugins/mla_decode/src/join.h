// join_splits: out = sum_k exp(log_sum_k) partial_k / sum_k exp(log_sum_k), kJoinColumns of a row.

#pragma once

#include "length.h"

namespace mla_decode
{

constexpr int kJoinWarps = 8;
constexpr int kJoinColumns = 128; // of one block: 4 in each lane, so that a warp reads 512 bytes

// Shared memory of a block: a weight of each split, then the sums of each warp.
MLA_BOTH size_t joinBytes(Sizes const& z)
{
    return sizeof(float) * ((z.splits + 3) / 4 * 4 + kJoinWarps * kJoinColumns);
}

// Each split's share of the row, in shared memory. A split that nothing was seen of has none.
template <typename Block>
MLA_FN void weigh_splits(Block& block, Step const& step, int row, float* weights)
{
    int const splits = step.sizes.splits;
    float const* logSum = step.logSum + static_cast<size_t>(row) * splits;
    block.each_warp([&](int warp) {
        // Every warp knows the whole row, and writes its part.
        Lanes const peaks = Lanes::of([&](int lane) {
            float peak = -INFINITY;
            for (int k = lane; k < splits; k += 32)
            {
                peak = fmaxf(peak, logSum[k]);
            }
            return peak;
        });
        float const most = peaks.largest();
        Lanes const sums = Lanes::of([&](int lane) {
            float sum = 0.0F;
            for (int k = lane; k < splits; k += 32)
            {
                sum += logSum[k] > -INFINITY ? expf(logSum[k] - most) : 0.0F;
            }
            return sum;
        });
        float const total = sums.total();
        Lanes::every([&](int lane) {
            for (int k = 32 * warp + lane; k < splits; k += 32 * kJoinWarps)
            {
                weights[k] = logSum[k] > -INFINITY ? expf(logSum[k] - most) / total : 0.0F;
            }
        });
    });
}

template <typename T, typename Block>
MLA_FN void join_splits(Block& block, Step const& step, float* memory, int row, int chunk)
{
    Sizes const& z = step.sizes;
    float* weights = memory;
    float* sums = memory + (z.splits + 3) / 4 * 4;
    int const first = chunk * kJoinColumns;
    weigh_splits(block, step, row, weights);
    float const* partial = step.partial + static_cast<size_t>(row) * z.splits * z.latent + first;
    block.each_warp([&](int warp) {
        Lanes::every([&](int lane) {
            int const column = 4 * lane;
            float sum[4] = {0.0F, 0.0F, 0.0F, 0.0F};
            if (first + column < z.latent)
            {
#pragma unroll 8
                for (int k = warp; k < z.splits; k += kJoinWarps)
                {
                    // Without a weight there is no partial: it is not read.
                    float const weight = weights[k];
                    if (weight > 0.0F)
                    {
                        float4 const part = *reinterpret_cast<float4 const*>(
                            partial + static_cast<size_t>(k) * z.latent + column);
                        sum[0] += weight * part.x;
                        sum[1] += weight * part.y;
                        sum[2] += weight * part.z;
                        sum[3] += weight * part.w;
                    }
                }
            }
            for (int i = 0; i < 4; ++i)
            {
                sums[warp * kJoinColumns + column + i] = sum[i];
            }
        });
    });
    T* out = static_cast<T*>(step.out) + static_cast<size_t>(row) * z.latent + first;
    block.each_warp([&](int warp) {
        Lanes::every([&](int lane) {
            int const column = 32 * warp + lane;
            if (column < kJoinColumns && first + column < z.latent)
            {
                float sum = 0.0F;
                for (int w = 0; w < kJoinWarps; ++w)
                {
                    sum += sums[w * kJoinColumns + column];
                }
                out[column] = Number<T>::narrow(sum);
            }
        });
    });
}

} // namespace mla_decode
