// EntropyPrune on a CUDA device: what the plugin calls, free of TensorRT types.
//
// In:  states [S, heads, dim], hidden [S, width], position_ids [axes, S], visual_index [N], all on the device.
// Out: the M = S - N + k positions of the sequence that stay, in order: their hidden states, position ids and indices;
// which of the M rows are visual; and the score of every visual token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "scorer.h"
#include "select.h"

namespace ep_export {

enum class Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Shape {
  int64_t sequence;  // S: what enters this cut, a prompt or what an earlier cut left of it
  int64_t visual;    // N
  int64_t kept;      // k
  int64_t heads;     // H
  int64_t dim;       // D
  int64_t width;     // d
  int64_t axes;      // A
};

struct Options {
  Scorer scorer = Scorer::kPaper;
  Select select = Select::kHighest;
  Budget budget = Budget::kJoint;
};

struct Tensors {
  void const* states;
  void const* hidden;
  int64_t const* position_ids;
  int64_t const* visual_index;
  void* kept_hidden;
  int64_t* kept_position_ids;
  int64_t* kept_index;         // [M], positions of the sequence
  int64_t* kept_visual_index;  // [k], rows of the output
  float* scores;               // [N], NaN where the token's states are not finite
};

// nullptr, or one sentence that says which dimension is out of range, got and expected.
char const* shape_error(Shape const& shape);

// Device memory that `launch` needs; a pointer from cudaMalloc is aligned well enough.
size_t workspace_bytes(Shape const& shape);

// Puts five kernels at most on `stream`: no allocation, no synchronisation, no copy to the host, so it can be captured
// in a CUDA graph. `workspace` must not be shared with a launch that may run at the same time.
cudaError_t launch(Shape const& shape, Options const& options, Type states_type, Type hidden_type,
                   Tensors const& tensors, void* workspace, cudaStream_t stream);

}  // namespace ep_export
