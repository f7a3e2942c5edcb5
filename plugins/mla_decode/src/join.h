// join_splits: out = sum_k exp(log_sum_k) partial_k / sum_k exp(log_sum_k).

#pragma once

#include "length.h"

namespace mla_decode
{

template <typename T, int WARPS, typename Block>
MLA_FN void join_splits(Block& block, Step const& step, int row)
{
    Sizes const& z = step.sizes;
    float const* logSum = step.logSum + static_cast<size_t>(row) * z.splits;
    float const* partial = step.partial + static_cast<size_t>(row) * z.splits * z.latent;
    T* out = static_cast<T*>(step.out) + static_cast<size_t>(row) * z.latent;
    float most = -INFINITY;
    for (int k = 0; k < z.splits; ++k)
    {
        most = fmaxf(most, logSum[k]);
    }
    block.each_warp([&](int warp) {
        Lanes::every([&](int lane) {
            for (int l = warp * 32 + lane; l < z.latent; l += WARPS * 32)
            {
                float sum = 0.0F;
                float weights = 0.0F;
                for (int k = 0; k < z.splits; ++k)
                {
                    // A split that nothing was seen of has written no partial: it is not read.
                    if (logSum[k] > -INFINITY)
                    {
                        float const weight = expf(logSum[k] - most);
                        weights += weight;
                        sum += weight * partial[static_cast<size_t>(k) * z.latent + l];
                    }
                }
                out[l] = Number<T>::narrow(weights > 0.0F ? sum / weights : 0.0F);
            }
        });
    });
}

} // namespace mla_decode
