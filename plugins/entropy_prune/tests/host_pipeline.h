// The kernels' own scoring and selection text, run on the host: what the tests compare with NumPy, and the GPU with it.
#pragma once

#include <memory>
#include <vector>

#include "../careful_score.h"
#include "../fast_score.h"
#include "../select.h"

namespace ep_export::host {

template <int kRows>
void score_rows(float const* x, int64_t tokens, int heads, int dim, Scorer scorer, float* scores, uint8_t* care) {
  auto const team = std::make_unique<HostWarp<Lane<kRows>>>();
  auto const fast = std::make_unique<FastStage<kRows>>();
  auto const careful = std::make_unique<CarefulStage<kRows>>();
  std::vector<float> rows(careful_row_floats(heads, dim));
  for (int64_t token = 0; token < tokens; ++token) {
    float const* const base = x + token * heads * dim;
    auto const load = [&](int i) { return base[i]; };
    FastScore const first = fast_score<kRows>(*team, load, heads, dim, scorer, *fast);
    bool const again = care[token] != 0 || first.needs_care;
    scores[token] = again ? careful_score<kRows>(*team, load, heads, dim, scorer, rows.data(), *careful) : first.value;
    care[token] = again ? 1 : 0;
  }
}

// x [tokens, heads, dim]. care [tokens]: in, 1 forces the careful path; out, 1 where it ran.
inline void scores(float const* x, int64_t tokens, int heads, int dim, Scorer scorer, float* out, uint8_t* care) {
  if (heads <= 16) {
    score_rows<16>(x, tokens, heads, dim, scorer, out, care);
  } else if (heads <= 32) {
    score_rows<32>(x, tokens, heads, dim, scorer, out, care);
  } else {
    score_rows<64>(x, tokens, heads, dim, scorer, out, care);
  }
}

// The positions of the sequence that stay and the output rows of those that are visual, both in order. What a broken
// visual_index leaves unwritten stays as it was. `threads` is the size of the block that is imitated.
inline void select_tokens(float const* score, int64_t const* visual_index, int visual, int64_t sequence, int kept,
                          Select select, Budget budget, int threads, int64_t* kept_index, int64_t* kept_visual_index) {
  std::vector<uint32_t> keys(visual);
  std::vector<int32_t> plan(visual + 1);
  for (int n = 0; n < visual; ++n) {
    keys[n] = budget == Budget::kJoint ? preference(score[n], select)
                                       : picture_preference(n, visual, visual_index, score, select);
  }
  HostBlock team(threads);
  SelectStage stage;
  make_plan(team, keys.data(), visual_index, visual, kept, stage, plan.data(), kept_visual_index);
  int64_t const rows = sequence - visual + kept;
  for (int64_t position = 0; position < sequence; ++position) {
    int64_t const row = output_row(position, visual, visual_index, plan.data(), rows);
    if (row >= 0) kept_index[row] = position;
  }
}

}  // namespace ep_export::host
