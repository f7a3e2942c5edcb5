// The kernels' launch on a stream; the one door between the plugin and the device code.

#pragma once

#include <cuda_runtime_api.h>

#include "step.h"

namespace mla_decode
{

// Enqueues append, attend and join. The caller has set sizes.splits and the scratch pointers.
cudaError_t launch(Step const& step, Element element, Storage storage, cudaStream_t stream);

} // namespace mla_decode
