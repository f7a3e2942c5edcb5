// The plugin's names, and its words to TensorRT's logger.

#pragma once

#include <string>

#include "step.h"

namespace mla_decode
{

constexpr char const* kPluginName = "MlaDecode";
constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "mla_deploy";

inline char const* storage_name(Storage storage)
{
    switch (storage)
    {
    case Storage::kPLAIN: return "plain";
    case Storage::kINT8: return "int8";
    case Storage::kFP8: return "fp8";
    }
    return "";
}

// An error, to the logger that TensorRT finds; to stderr where it finds none, as TensorRT-RTX does.
void report(std::string const& message);

} // namespace mla_decode
