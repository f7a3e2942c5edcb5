// __global__ functions around kernels.h, one for each element type, storage and block height, and
// their launch.

#include "block_cuda.h"
#include "kernels.h"
#include "launch.h"

namespace mla_decode
{
namespace
{

// Blocks of attend on one multiprocessor: two where its shared memory holds them (228 KiB), and one
// computes while the other waits. It leaves a thread 128 registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int kResident = 2;
#else
constexpr int kResident = 1;
#endif

template <typename T, typename Coding>
__global__ void __launch_bounds__(32 * kAppendWarps) append_kernel(Step const step)
{
    Block<kAppendWarps> block;
    append_row<T, Coding>(block, step, blockIdx.y, blockIdx.x);
}

// WIDEST: rows of 512 and 64 columns, which nearly every model has. Known when compiling, they turn
// offsets into constants and bounds into nothing.
template <typename T, typename Coding, int ROWS, bool WIDEST>
__global__ void __launch_bounds__(32 * Attend<T, ROWS>::kWarps, kResident) attend_kernel(Step const step)
{
    extern __shared__ __align__(16) char memory[];
    Block<Attend<T, ROWS>::kWarps> block;
    Step known = step;
    if constexpr (WIDEST)
    {
        known.sizes.latent = kMaxLatent;
        known.sizes.rope = kMaxRow - kMaxLatent;
    }
    attend_split<T, Coding, ROWS>(block, known, memory, blockIdx.x, blockIdx.y, blockIdx.z);
}

template <typename T>
__global__ void __launch_bounds__(32 * kJoinWarps) join_kernel(Step const step)
{
    extern __shared__ __align__(16) char memory[];
    Block<kJoinWarps> block;
    join_splits<T>(block, step, reinterpret_cast<float*>(memory), blockIdx.x, blockIdx.y);
}

template <typename T, typename Coding, int ROWS>
cudaError_t attend(Step const& step, cudaStream_t stream)
{
    Sizes const& z = step.sizes;
    size_t const bytes = Shared<T, Coding>(z, ROWS).bytes;
    bool const widest = z.latent == kMaxLatent && z.latent + z.rope == kMaxRow;
    auto const kernel = widest ? attend_kernel<T, Coding, ROWS, true> : attend_kernel<T, Coding, ROWS, false>;
    cudaError_t const set
        = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (set != cudaSuccess)
    {
        return set;
    }
    dim3 const grid(ceilDiv(z.newTokens * z.heads, ROWS), z.splits, z.batch);
    kernel<<<grid, 32 * Attend<T, ROWS>::kWarps, bytes, stream>>>(step);
    return cudaGetLastError();
}

template <typename T, typename Coding>
cudaError_t run(Step const& step, cudaStream_t stream)
{
    Sizes const& z = step.sizes;
    append_kernel<T, Coding><<<dim3(z.newTokens, z.batch), 32 * kAppendWarps, 0, stream>>>(step);
    cudaError_t const appended = cudaGetLastError();
    if (appended != cudaSuccess)
    {
        return appended;
    }
    cudaError_t const attended
        = rowsPerBlock(z) == 16 ? attend<T, Coding, 16>(step, stream) : attend<T, Coding, 32>(step, stream);
    if (attended != cudaSuccess)
    {
        return attended;
    }
    dim3 const grid(z.batch * z.newTokens * z.heads, ceilDiv(z.latent, kJoinColumns));
    join_kernel<T><<<grid, 32 * kJoinWarps, joinBytes(z), stream>>>(step);
    return cudaGetLastError();
}

template <typename T>
cudaError_t run_stored(Step const& step, Storage storage, cudaStream_t stream)
{
    switch (storage)
    {
    case Storage::kPLAIN: return run<T, Plain<T>>(step, stream);
    case Storage::kINT8: return run<T, Int8>(step, stream);
    case Storage::kFP8: return run<T, Fp8>(step, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace

cudaError_t launch(Step const& step, Element element, Storage storage, cudaStream_t stream)
{
    if (step.sizes.batch == 0 || step.sizes.newTokens == 0)
    {
        return cudaSuccess;
    }
    if (element == Element::kHALF)
    {
        return run_stored<__half>(step, storage, stream);
    }
    return run_stored<__nv_bfloat16>(step, storage, stream);
}

} // namespace mla_decode
