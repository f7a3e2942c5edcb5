// MlaDecode's three steps, each the work of one block, written once for the device and for a CPU
// (block_cuda.h, block_host.h; a Block type is the first argument).
//
//   append_row    append.h
//   attend_split  attend.h, with tile.h
//   join_splits   join.h
//
// A token at or beyond a row's length is never read, in any step. Products are of the query's type
// and every sum is fp32.

#pragma once

#include "append.h"
#include "attend.h"
#include "join.h"
