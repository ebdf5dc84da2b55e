// One call of the plugin on a GPU, and the check of all it writes against the same text on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "driver.h"
#include "host_pipeline.h"

namespace harness {

// Tensors of one call with float32 states and hidden states, in the order of the node.
struct InputValues {
  std::vector<float> states, hidden;
  std::vector<int64_t> position_ids, visual_index;
};

struct OutputValues {
  std::vector<float> hidden;
  std::vector<int64_t> position_ids, index, visual_index;
  std::vector<float> scores;
};

inline std::vector<float> random_values(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& x : out) x = normal(random);
  return out;
}

class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory const&) = delete;
  DeviceMemory& operator=(DeviceMemory const&) = delete;
  ~DeviceMemory() {
    for (void* const memory : owned_) cudaFree(memory);
  }

  // Filled with ones: a call that writes nothing cannot pass.
  void* make(size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes) == cudaSuccess, "cudaMalloc");
    owned_.push_back(memory);
    check(cudaMemset(memory, 0xff, bytes) == cudaSuccess, "cudaMemset");
    return memory;
  }

  template <class T>
  void* copy_of(std::vector<T> const& values) {
    void* const memory = make(values.size() * sizeof(T));
    check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess,
          "copy in");
    return memory;
  }

  template <class T>
  static std::vector<T> read(void const* memory, int64_t count) {
    std::vector<T> out(count);
    check(cudaMemcpy(out.data(), memory, out.size() * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess, "copy out");
    return out;
  }

 private:
  std::vector<void*> owned_;
};

inline OutputValues run_on_device(Call const& call, char const* budget, InputValues const& in) {
  DeviceMemory memory;
  auto const plugin = create({{"budget", budget}});
  auto const tensors = call.describe();
  void const* const inputs[kInputs]{memory.copy_of(in.states), memory.copy_of(in.hidden),
                                    memory.copy_of(in.position_ids), memory.copy_of(in.visual_index),
                                    memory.make(call.kept * 8)};
  void* const outputs[kOutputs]{memory.make(call.rows() * call.width * 4), memory.make(call.axes * call.rows() * 8),
                                memory.make(call.rows() * 8), memory.make(call.kept * 8), memory.make(call.visual * 4)};
  cudaStream_t stream;
  check(cudaStreamCreate(&stream) == cudaSuccess, "stream");
  auto* const runtime = runtime_of(*plugin);
  PluginTensorDesc const* const out_descs = tensors.data() + kInputs;
  int32_t error = runtime->onShapeChange(tensors.data(), kInputs, out_descs, kOutputs);
  check(error == 0, "shapes: " + g_log.errors);
  error = runtime->enqueue(tensors.data(), out_descs, inputs, outputs, memory.make(workspace(call)), stream);
  check(error == 0, "enqueue: " + g_log.errors);
  check(cudaStreamSynchronize(stream) == cudaSuccess, "synchronize");
  check(cudaStreamDestroy(stream) == cudaSuccess, "stream");
  return {DeviceMemory::read<float>(outputs[0], call.rows() * call.width),
          DeviceMemory::read<int64_t>(outputs[1], call.axes * call.rows()),
          DeviceMemory::read<int64_t>(outputs[2], call.rows()), DeviceMemory::read<int64_t>(outputs[3], call.kept),
          DeviceMemory::read<float>(outputs[4], call.visual)};
}

// Scores against the host's within the bound between two exact scorers in nats: sqrtf and logf may differ in their last
// digit. All else exactly, given the device's scores.
inline void check_outputs(Call const& call, char const* budget, InputValues const& in, OutputValues const& out) {
  size_t const size = call.heads * call.dim;
  std::vector<float> tokens(call.visual * size);
  for (int64_t n = 0; n < call.visual; ++n) {
    std::memcpy(tokens.data() + n * size, in.states.data() + in.visual_index[n] * size, size * 4);
  }
  std::vector<float> scores(call.visual);
  std::vector<uint8_t> care(call.visual);
  ep_export::host::scores(tokens.data(), call.visual, static_cast<int>(call.heads), static_cast<int>(call.dim),
                          ep_export::Scorer::kPaper, scores.data(), care.data());
  for (int64_t n = 0; n < call.visual; ++n) check(std::fabs(out.scores[n] - scores[n]) <= 2e-6f, "scores");

  std::vector<int64_t> index(call.rows());
  std::vector<int64_t> visual_index(call.kept);
  ep_export::host::select_tokens(
      out.scores.data(), in.visual_index.data(), static_cast<int>(call.visual), call.sequence,
      static_cast<int>(call.kept), ep_export::Select::kHighest,
      std::string(budget) == "joint" ? ep_export::Budget::kJoint : ep_export::Budget::kPerPicture,
      ep_export::kSelectThreads, index.data(), visual_index.data());
  check(out.index == index, "kept_index");
  check(out.visual_index == visual_index, "kept_visual_index");
  for (int64_t row = 0; row < call.rows(); ++row) {
    check(std::memcmp(out.hidden.data() + row * call.width, in.hidden.data() + index[row] * call.width,
                      call.width * 4) == 0,
          "kept_hidden");
    for (int64_t axis = 0; axis < call.axes; ++axis) {
      check(out.position_ids[axis * call.rows() + row] == in.position_ids[axis * call.sequence + index[row]],
            "kept_position_ids");
    }
  }
}

}  // namespace harness
