// A C interface to the launch function for gpu_check.py, which has PyTorch's pointers and stream but no TensorRT.
#include "../entropy_prune.h"

using namespace ep_export;

namespace {

Shape shape_of(int64_t const* s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]}; }

}  // namespace

// shape: S, N, k, H, D, d, A.
extern "C" size_t ep_gpu_workspace_bytes(int64_t const* shape) { return workspace_bytes(shape_of(shape)); }

// options: scorer, select, budget. tensors: states, hidden, position_ids, visual_index, and the five outputs.
// Returns a cudaError_t.
extern "C" int ep_gpu_launch(int64_t const* shape, int const* options, int states_type, int hidden_type,
                             void* const* tensors, void* workspace, void* stream) {
  Options const chosen{static_cast<Scorer>(options[0]), static_cast<Select>(options[1]),
                       static_cast<Budget>(options[2])};
  Tensors const all{tensors[0],
                    tensors[1],
                    static_cast<int64_t const*>(tensors[2]),
                    static_cast<int64_t const*>(tensors[3]),
                    tensors[4],
                    static_cast<int64_t*>(tensors[5]),
                    static_cast<int64_t*>(tensors[6]),
                    static_cast<int64_t*>(tensors[7]),
                    static_cast<float*>(tensors[8])};
  return launch(shape_of(shape), chosen, static_cast<Type>(states_type), static_cast<Type>(hidden_type), all, workspace,
                static_cast<cudaStream_t>(stream));
}
