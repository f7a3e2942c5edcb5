// append_row: new_row_BSE -> its slot of cache_B1ME, coded where the cache is.

#pragma once

#include "length.h"

namespace mla_decode
{

template <typename T, typename Coding, typename Block>
MLA_FN void append_row(Block& block, Step const& step, int b, int s)
{
    using Stored = typename Coding::Stored;
    Sizes const& z = step.sizes;
    int const width = z.latent + z.rope;
    Length const length = length_of(step, b);
    if (s >= length.fresh)
    {
        return;
    }
    size_t const slot = static_cast<size_t>(b) * z.capacity + length.cached + s;
    T const* from = static_cast<T const*>(step.newRow) + (static_cast<size_t>(b) * z.newTokens + s) * width;
    Stored* to = static_cast<Stored*>(step.cache) + slot * width;
    if constexpr (!Coding::kCODED)
    {
        block.each_warp([&](int warp) {
            Lanes::every([&](int lane) {
                for (int e = warp * 32 + lane; e < width; e += kAppendWarps * 32)
                {
                    to[e] = from[e];
                }
            });
        });
    }
    else
    {
        int const latentScales = z.latent / z.tile;
        int const scales = scalesPerRow(z);
        block.each_warp([&](int warp) {
            for (int g = warp; g < scales; g += kAppendWarps)
            {
                int const columns = g < latentScales ? z.tile : z.ropeTile;
                int const first = g < latentScales ? g * z.tile : z.latent + (g - latentScales) * z.ropeTile;
                Lanes const peaks = Lanes::of([&](int lane) {
                    float peak = 0.0F;
                    for (int e = lane; e < columns; e += 32)
                    {
                        peak = fmaxf(peak, fabsf(Number<T>::wide(from[first + e])));
                    }
                    return peak;
                });
                float const wanted = peaks.largest() / Coding::kLARGEST;
                float const scale = wanted > 0.0F ? wanted : 1.0F;
                Lanes::every([&](int lane) {
                    for (int e = lane; e < columns; e += 32)
                    {
                        to[first + e] = Coding::encode(Number<T>::wide(from[first + e]) / scale);
                    }
                    if (lane == 0)
                    {
                        step.scales[slot * scales + g] = scale;
                    }
                });
            }
        });
    }
}

} // namespace mla_decode
