// EntropyPrune: score every visual token, keep k, gather what stays.
//
// | kernel        | grid x block         | shared memory          | work                                              |
// | score_tokens  | N/4 x 128, N/2 x 64  | 11, 20 or 36 KiB       | a warp a token: one pass, Gram matrix, entropy    |
// | score_careful | <= 2048 x 32         | <= 48 KiB, else global | a warp a token, only those that score_tokens left |
// | rank_pictures | N/256 x 256          | none                   | a thread a token, only for a budget per picture   |
// | plan_rows     | 1 x 1024             | 5 KiB                  | radix select, prefix sums                         |
// | gather_rows   | S x 128              | none                   | a block a position, accesses of 16 bytes          |
//
// Accumulation: fp32 (fast_score.h, careful_score.h, spectrum.h); integers elsewhere. Atomics only count, so results do
// not depend on timing. Compiled with -fmad=false: every fused multiply-add is written as fmaf, as on the host where
// the same text is tested.
//
// The scores go straight to their output: score_tokens leaves a mark there that score_careful replaces, and the
// selection reads them from there.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "careful_score.h"
#include "entropy_prune.h"
#include "fast_score.h"

namespace ep_export {
namespace {

constexpr int kGatherThreads = 128;
constexpr int kRankThreads = 256;
constexpr int64_t kCarefulBlocks = 2048;
constexpr int64_t kCarefulBlocksInGlobal = 128;  // each then owns a slice of the workspace
constexpr size_t kSharedLimit = 48 * 1024;       // what every GPU grants without asking
constexpr size_t kAlign = 256;
// A NaN that no arithmetic makes: this token waits for score_careful.
constexpr uint32_t kNeedsCare = 0x7fc0ca4eu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

template <int kRows>
constexpr int kWarpsPerBlock = kRows > kWarpLanes ? 2 : 4;

template <class Value, int kRows>
__global__ void __launch_bounds__(kWarpsPerBlock<kRows>* kWarpLanes)
    score_tokens(Value const* states, int64_t sequence, int64_t const* visual_index, int visual, int heads, int dim,
                 Scorer scorer, float* scores) {
  __shared__ FastStage<kRows> stages[kWarpsPerBlock<kRows>];
  int const warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  int const lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  int const n = static_cast<int>(blockIdx.x) * kWarpsPerBlock<kRows> + warp;
  if (n >= visual) return;  // a whole warp leaves; nothing below waits for the block
  int64_t const position = visual_index[n];
  if (position < 0 || position >= sequence) {  // not a position: never read outside, rank last
    if (lane == 0) scores[n] = not_a_number();
    return;
  }
  Value const* const token = states + position * heads * dim;
  auto const load = [=](int i) { return to_float(token[i]); };
  Lane<kRows> own;
  DeviceWarp<Lane<kRows>> team(lane, own);
  FastScore const score = fast_score<kRows>(team, load, heads, dim, scorer, stages[warp]);
  if (lane == 0) scores[n] = score.needs_care ? __uint_as_float(kNeedsCare) : score.value;
}

// Rare, so the element type is a run-time branch: a third of the code to compile.
struct AnyLoad {
  void const* token;
  Type type;

  __device__ __forceinline__ float operator()(int i) const {
    if (type == Type::kFloat16) return to_float(static_cast<__half const*>(token)[i]);
    if (type == Type::kBFloat16) return to_float(static_cast<__nv_bfloat16 const*>(token)[i]);
    return static_cast<float const*>(token)[i];
  }
};

template <int kRows>
__global__ void __launch_bounds__(kWarpLanes)
    score_careful(void const* states, Type type, int64_t const* visual_index, int visual, int heads, int dim,
                  Scorer scorer, float* scores, float* scratch) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& stage = *reinterpret_cast<CarefulStage<kRows>*>(memory);
  float* const rows = scratch == nullptr ? reinterpret_cast<float*>(memory + sizeof(CarefulStage<kRows>))
                                         : scratch + static_cast<size_t>(blockIdx.x) * careful_row_floats(heads, dim);
  size_t const bytes = type == Type::kFloat32 ? 4 : 2;
  int const lane = static_cast<int>(threadIdx.x);
  for (int n = static_cast<int>(blockIdx.x); n < visual; n += static_cast<int>(gridDim.x)) {
    if (__float_as_uint(scores[n]) != kNeedsCare) continue;
    AnyLoad const load{static_cast<unsigned char const*>(states) + visual_index[n] * heads * dim * bytes, type};
    Lane<kRows> own;
    DeviceWarp<Lane<kRows>> team(lane, own);
    float const score = careful_score<kRows>(team, load, heads, dim, scorer, rows, stage);
    __syncwarp();  // every lane has compared scores[n]; and `stage` is free again
    if (lane == 0) scores[n] = score;
  }
}

__global__ void __launch_bounds__(kRankThreads)
    rank_pictures(float const* scores, int64_t const* visual_index, int visual, Select select, uint32_t* keys) {
  int const n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (n < visual) keys[n] = picture_preference(n, visual, visual_index, scores, select);
}

__global__ void __launch_bounds__(kSelectThreads)
    plan_rows(float const* scores, int64_t const* visual_index, int visual, int kept, Select select, Budget budget,
              uint32_t* keys, int32_t* plan, int64_t* kept_visual_index) {
  __shared__ SelectStage stage;
  DeviceBlock team;
  if (budget == Budget::kJoint) {
    team.each([&](int thread) {
      for (int n = thread; n < visual; n += team.size()) keys[n] = preference(scores[n], select);
    });
  }
  make_plan(team, keys, visual_index, visual, kept, stage, plan, kept_visual_index);
}

// `Word` is the widest type that divides a row and its alignment.
template <class Word>
__global__ void __launch_bounds__(kGatherThreads)
    gather_rows(Word const* hidden, int words, int64_t const* position_ids, int axes, int64_t sequence,
                int64_t const* visual_index, int visual, int64_t rows, int32_t const* plan, Word* kept_hidden,
                int64_t* kept_position_ids, int64_t* kept_index) {
  int64_t const position = blockIdx.x;
  int64_t const row = output_row(position, visual, visual_index, plan, rows);
  if (row < 0) return;
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kGatherThreads) {
    kept_hidden[row * words + i] = hidden[position * words + i];
  }
  for (int axis = static_cast<int>(threadIdx.x); axis < axes; axis += kGatherThreads) {
    kept_position_ids[axis * rows + row] = position_ids[axis * sequence + position];
  }
  if (threadIdx.x == 0) kept_index[row] = position;
}

struct Workspace {
  size_t keys, plan, scratch, total;
};

template <int kRows>
size_t careful_shared(Shape const& shape) {
  return sizeof(CarefulStage<kRows>) +
         sizeof(float) * careful_row_floats(static_cast<int>(shape.heads), static_cast<int>(shape.dim));
}

bool careful_in_shared(Shape const& shape) {
  if (shape.heads <= 16) return careful_shared<16>(shape) <= kSharedLimit;
  if (shape.heads <= 32) return careful_shared<32>(shape) <= kSharedLimit;
  return careful_shared<64>(shape) <= kSharedLimit;
}

Workspace workspace_of(Shape const& shape) {
  size_t const visual = static_cast<size_t>(shape.visual);
  size_t const slots = careful_in_shared(shape) ? 0 : std::min<int64_t>(shape.visual, kCarefulBlocksInGlobal);
  Workspace at{};
  at.plan = aligned(visual * sizeof(uint32_t));
  at.scratch = at.plan + aligned((visual + 1) * sizeof(int32_t));
  at.total = at.scratch +
             slots * sizeof(float) * careful_row_floats(static_cast<int>(shape.heads), static_cast<int>(shape.dim));
  return at;
}

template <int kRows, class Value>
void launch_fast(Shape const& shape, Options const& options, Tensors const& tensors, cudaStream_t stream) {
  constexpr int kWarps = kWarpsPerBlock<kRows>;
  auto const blocks = static_cast<unsigned>((shape.visual + kWarps - 1) / kWarps);
  score_tokens<Value, kRows><<<blocks, kWarps * kWarpLanes, 0, stream>>>(
      static_cast<Value const*>(tensors.states), shape.sequence, tensors.visual_index, static_cast<int>(shape.visual),
      static_cast<int>(shape.heads), static_cast<int>(shape.dim), options.scorer, tensors.scores);
}

template <int kRows>
void launch_scores(Shape const& shape, Options const& options, Type type, Tensors const& tensors, float* scratch,
                   cudaStream_t stream) {
  if (type == Type::kFloat16) {
    launch_fast<kRows, __half>(shape, options, tensors, stream);
  } else if (type == Type::kBFloat16) {
    launch_fast<kRows, __nv_bfloat16>(shape, options, tensors, stream);
  } else {
    launch_fast<kRows, float>(shape, options, tensors, stream);
  }
  bool const shared = careful_in_shared(shape);
  size_t const bytes = shared ? careful_shared<kRows>(shape) : sizeof(CarefulStage<kRows>);
  auto const blocks = static_cast<unsigned>(std::min(shape.visual, shared ? kCarefulBlocks : kCarefulBlocksInGlobal));
  score_careful<kRows><<<blocks, kWarpLanes, bytes, stream>>>(
      tensors.states, type, tensors.visual_index, static_cast<int>(shape.visual), static_cast<int>(shape.heads),
      static_cast<int>(shape.dim), options.scorer, tensors.scores, shared ? nullptr : scratch);
}

template <class Word>
void launch_gather(Shape const& shape, size_t row_bytes, Tensors const& tensors, int32_t const* plan,
                   cudaStream_t stream) {
  int64_t const rows = shape.sequence - shape.visual + shape.kept;
  gather_rows<Word><<<static_cast<unsigned>(shape.sequence), kGatherThreads, 0, stream>>>(
      static_cast<Word const*>(tensors.hidden), static_cast<int>(row_bytes / sizeof(Word)), tensors.position_ids,
      static_cast<int>(shape.axes), shape.sequence, tensors.visual_index, static_cast<int>(shape.visual), rows, plan,
      static_cast<Word*>(tensors.kept_hidden), tensors.kept_position_ids, tensors.kept_index);
}

bool in(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }

}  // namespace

char const* shape_error(Shape const& shape) {
  if (!in(shape.heads, 1, kMaxHeads)) return "states: number of heads is out of range, expected 1 to 64";
  if (!in(shape.dim, 1, kMaxDim)) return "states: head dimension is out of range, expected 1 to 256";
  if (!in(shape.visual, 1, kMaxVisual)) return "visual_index: length is out of range, expected 1 to 65536";
  if (!in(shape.kept, 1, shape.visual)) return "keep_slots: length is out of range, expected 1 to that of visual_index";
  if (!in(shape.sequence, shape.visual, INT32_MAX)) return "hidden: the sequence is shorter than visual_index";
  if (!in(shape.width, 1, 1 << 20)) return "hidden: width is out of range, expected 1 to 1048576";
  if (!in(shape.axes, 1, 16)) return "position_ids: axes are out of range, expected 1 to 16";
  return nullptr;
}

size_t workspace_bytes(Shape const& shape) { return workspace_of(shape).total; }

cudaError_t launch(Shape const& shape, Options const& options, Type states_type, Type hidden_type,
                   Tensors const& tensors, void* workspace, cudaStream_t stream) {
  if (shape_error(shape) != nullptr) return cudaErrorInvalidValue;
  auto* const base = static_cast<unsigned char*>(workspace);
  Workspace const at = workspace_of(shape);
  auto* const keys = reinterpret_cast<uint32_t*>(base + at.keys);
  auto* const plan = reinterpret_cast<int32_t*>(base + at.plan);
  auto* const scratch = reinterpret_cast<float*>(base + at.scratch);
  int const visual = static_cast<int>(shape.visual);

  if (shape.heads <= 16) {
    launch_scores<16>(shape, options, states_type, tensors, scratch, stream);
  } else if (shape.heads <= 32) {
    launch_scores<32>(shape, options, states_type, tensors, scratch, stream);
  } else {
    launch_scores<64>(shape, options, states_type, tensors, scratch, stream);
  }
  if (options.budget == Budget::kPerPicture) {
    rank_pictures<<<static_cast<unsigned>((visual + kRankThreads - 1) / kRankThreads), kRankThreads, 0, stream>>>(
        tensors.scores, tensors.visual_index, visual, options.select, keys);
  }
  plan_rows<<<1, kSelectThreads, 0, stream>>>(tensors.scores, tensors.visual_index, visual,
                                              static_cast<int>(shape.kept), options.select, options.budget, keys, plan,
                                              tensors.kept_visual_index);
  size_t const row_bytes = static_cast<size_t>(shape.width) * (hidden_type == Type::kFloat32 ? 4 : 2);
  auto const spread = reinterpret_cast<uintptr_t>(tensors.hidden) | reinterpret_cast<uintptr_t>(tensors.kept_hidden);
  if ((row_bytes | spread) % 16 == 0) {
    launch_gather<uint4>(shape, row_bytes, tensors, plan, stream);
  } else if ((row_bytes | spread) % 4 == 0) {
    launch_gather<uint32_t>(shape, row_bytes, tensors, plan, stream);
  } else {
    launch_gather<uint16_t>(shape, row_bytes, tensors, plan, stream);
  }
  return cudaGetLastError();
}

}  // namespace ep_export
