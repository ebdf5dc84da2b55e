// Teams: one algorithm text for a CUDA warp or block and for a plain CPU.
//
// The algorithms of this plugin are written as phases, `team.each(body)`, in which every lane runs `body(lane, own
// state)` and after which all lanes see what the others wrote. On a GPU a team is a warp or a block: `each` runs the
// body once and synchronises, and the state lives in registers. On a host a team is a loop over the same lanes with an
// array of states. Reductions add in the same (butterfly) order on both, so a CPU test exercises the arithmetic of the
// kernel, and not a second implementation of it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EP_HD __host__ __device__ __forceinline__
#define EP_UNROLL _Pragma("unroll")
#else
#define EP_HD inline
#define EP_UNROLL
#endif

namespace ep_export {

constexpr int kWarpLanes = 32;

// Four floats that move as one 16-byte access; the compiler does not merge accesses whose alignment it cannot prove.
// may_alias: they are read from memory written as single floats of other structs, which GCC at -O3 would otherwise take
// for other memory.
struct alignas(16) [[gnu::may_alias]] Quad {
  float lane[4];
};

template <int kCount>
EP_HD void copy_floats(float* to, float const* from) {
  if constexpr (kCount % 4 == 0) {
    EP_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      Quad const quad = *reinterpret_cast<Quad const*>(from + i);
      EP_UNROLL
      for (int j = 0; j < 4; ++j) to[i + j] = quad.lane[j];
    }
  } else {
    EP_UNROLL
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

#if defined(__CUDACC__)

// A warp: the lane's state stays in registers because every team call is inlined and indexes it with constants.
template <class State>
class DeviceWarp {
 public:
  __device__ __forceinline__ DeviceWarp(int lane, State& state) : lane_(lane), state_(state) {}

  template <class Body>
  __device__ __forceinline__ void each(Body body) {
    body(lane_, state_);
    __syncwarp();
  }

  template <class Value>
  __device__ __forceinline__ float sum(Value value) {
    float total = value(lane_, state_);
    EP_UNROLL
    for (int step = kWarpLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    __syncwarp();
    return total;
  }

  template <class Value>
  __device__ __forceinline__ float max(Value value) {
    float best = value(lane_, state_);
    EP_UNROLL
    for (int step = kWarpLanes / 2; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, step));
    __syncwarp();
    return best;
  }

 private:
  int lane_;
  State& state_;
};

// A block of threads that share memory; only `each` is needed at this level.
class DeviceBlock {
 public:
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }

  template <class Body>
  __device__ __forceinline__ void each(Body body) {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  // Integer addition commutes: the counts are the same whatever the order of the threads.
  static __device__ __forceinline__ void add(uint32_t* counter) { atomicAdd(counter, 1u); }
};

#else

template <class State>
class HostWarp {
 public:
  template <class Body>
  void each(Body body) {
    for (int lane = 0; lane < kWarpLanes; ++lane) body(lane, states_[lane]);
  }

  template <class Value>
  float sum(Value value) {
    return reduce(value, [](float a, float b) { return a + b; });
  }

  template <class Value>
  float max(Value value) {
    // fmaxf on the device ignores a NaN operand; so does this.
    return reduce(value, [](float a, float b) { return a != a ? b : (b > a ? b : a); });
  }

 private:
  template <class Value, class Combine>
  float reduce(Value value, Combine combine) {
    float now[kWarpLanes];
    float next[kWarpLanes];
    for (int lane = 0; lane < kWarpLanes; ++lane) now[lane] = value(lane, states_[lane]);
    for (int step = kWarpLanes / 2; step > 0; step /= 2) {
      for (int lane = 0; lane < kWarpLanes; ++lane) next[lane] = combine(now[lane], now[lane ^ step]);
      for (int lane = 0; lane < kWarpLanes; ++lane) now[lane] = next[lane];
    }
    return now[0];
  }

  State states_[kWarpLanes];
};

class HostBlock {
 public:
  explicit HostBlock(int size) : size_(size) {}
  int size() const { return size_; }

  template <class Body>
  void each(Body body) {
    for (int thread = 0; thread < size_; ++thread) body(thread);
  }

  static void add(uint32_t* counter) { ++*counter; }

 private:
  int size_;
};

#endif

}  // namespace ep_export
