// From scores to rows of the output: which visual tokens stay, and where every position goes.
//
// Exact and deterministic for 1 to 65,536 tokens: scores become 32-bit keys whose order is the order of preference, a
// radix select by one block finds the k-th key, and equal keys are taken from the lowest index up.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "team.h"

namespace ep_export {

constexpr int kMaxVisual = 65536;
constexpr int kSelectThreads = 1024;

enum class Select : int32_t { kHighest = 0, kLowest = 1 };
enum class Budget : int32_t { kJoint = 0, kPerPicture = 1 };

// Larger is better. A score that is not finite gets 0, which no finite score has, in either direction.
EP_HD uint32_t preference(float score, Select select) {
  if (!(fabsf(score) < INFINITY)) return 0;
  float const zero_is_positive = score + 0.f;  // -0 and 0 are a tie
  uint32_t bits;
  memcpy(&bits, &zero_is_positive, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return select == Select::kHighest ? bits : ~bits;
}

// First i in [0, count) with at(i) >= value, else count; `at` does not decrease.
template <class At>
EP_HD int first_not_below(int count, int64_t value, At at) {
  int low = 0;
  int high = count;
  while (low < high) {
    int const middle = low + (high - low) / 2;
    if (at(middle) < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Preference under a budget per picture: by (r + 1/2) / N_picture for the token's rank r within its picture, smallest
// first. A picture is a maximal run of consecutive positions: within one, position minus index is constant, and it
// grows from one to the next. The quotient is one IEEE float32 division, as in the node's ONNX body, so that ties are
// the same ties.
EP_HD uint32_t picture_preference(int n, int visual, int64_t const* visual_index, float const* scores, Select select) {
  auto const offset = [&](int i) { return visual_index[i] - i; };
  int const begin = first_not_below(visual, offset(n), offset);
  int const end = first_not_below(visual, offset(n) + 1, offset);
  uint32_t const own = preference(scores[n], select);
  int rank = 0;
  for (int other = begin; other < end; ++other) {
    uint32_t const key = preference(scores[other], select);
    rank += key > own || (key == own && other < n);
  }
  float const share = (static_cast<float>(rank) + 0.5f) / static_cast<float>(end - begin);
  return preference(share, Select::kLowest);
}

struct SelectStage {
  uint32_t bins[256];
  uint32_t counts[kSelectThreads];
  uint32_t groups[kSelectThreads / kWarpLanes];
  uint32_t key;   // the k-th key, found 8 bits at a time
  uint32_t need;  // how many tokens with exactly that prefix are still to be taken
};

// Sum of counts[0..thread), after `groups` holds the sums of 32 counts each.
EP_HD uint32_t sum_before(SelectStage const& stage, int thread) {
  uint32_t total = 0;
  for (int group = 0; group < thread / kWarpLanes; ++group) total += stage.groups[group];
  for (int other = thread / kWarpLanes * kWarpLanes; other < thread; ++other) total += stage.counts[other];
  return total;
}

template <class Team>
EP_HD void sum_groups(Team& team, SelectStage& stage) {
  team.each([&](int thread) {
    if (thread * kWarpLanes >= team.size()) return;
    uint32_t total = 0;
    for (int i = 0; i < kWarpLanes; ++i) total += stage.counts[thread * kWarpLanes + i];
    stage.groups[thread] = total;
  });
}

// plan[n] = 2 x (visual tokens dropped before n) + (n is kept), for n < visual; plan[visual] = 2 x (all dropped).
// kept_visual_index [kept]: the output rows of the visual tokens that stay, in order. Its slots are counted, not looked
// up, so each is written once whatever visual_index holds; and an index outside the sequence becomes one outside the
// output, on the same side, because at most visual - kept is taken off.
// The team's size is a multiple of 32, at least 256 and at most kSelectThreads.
template <class Team>
EP_HD void make_plan(Team& team, uint32_t const* keys, int64_t const* visual_index, int visual, int kept,
                     SelectStage& stage, int32_t* plan, int64_t* kept_visual_index) {
  team.each([&](int thread) {
    if (thread == 0) {
      stage.key = 0;
      stage.need = static_cast<uint32_t>(kept);
    }
  });
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint32_t const mask = shift == 24 ? 0u : ~0u << (shift + 8);
    team.each([&](int thread) {
      if (thread < 256) stage.bins[thread] = 0;
    });
    team.each([&](int thread) {
      for (int n = thread; n < visual; n += team.size()) {
        if ((keys[n] & mask) == stage.key) Team::add(&stage.bins[keys[n] >> shift & 255u]);
      }
    });
    team.each([&](int thread) {
      if (thread >= 16) return;
      uint32_t total = 0;
      for (int i = 0; i < 16; ++i) total += stage.bins[16 * thread + i];
      stage.groups[thread] = total;
    });
    team.each([&](int thread) {
      if (thread >= 256) return;
      uint32_t above = 0;
      for (int group = 15; group > thread / 16; --group) above += stage.groups[group];
      for (int bin = thread / 16 * 16 + 15; bin > thread; --bin) above += stage.bins[bin];
      stage.counts[thread] = above;
    });
    // Two phases, because the winner changes what the others still compare with.
    team.each([&](int thread) {
      if (thread >= 256) return;
      uint32_t const above = stage.counts[thread];
      stage.bins[thread] = above < stage.need && stage.need <= above + stage.bins[thread];
    });
    team.each([&](int thread) {
      if (thread >= 256 || !stage.bins[thread]) return;
      stage.key |= static_cast<uint32_t>(thread) << shift;
      stage.need -= stage.counts[thread];
    });
  }

  // From here a thread walks a run of neighbours, because ties and prefix sums depend on the order.
  int const run = (visual + team.size() - 1) / team.size();
  team.each([&](int thread) {
    uint32_t equal = 0;
    for (int n = thread * run; n < visual && n < (thread + 1) * run; ++n) equal += keys[n] == stage.key;
    stage.counts[thread] = equal;
  });
  sum_groups(team, stage);
  team.each([&](int thread) {
    uint32_t equal = sum_before(stage, thread);
    for (int n = thread * run; n < visual && n < (thread + 1) * run; ++n) {
      bool const keep = keys[n] > stage.key || (keys[n] == stage.key && equal < stage.need);
      equal += keys[n] == stage.key;
      plan[n] = keep;
    }
  });
  team.each([&](int thread) {
    uint32_t dropped = 0;
    for (int n = thread * run; n < visual && n < (thread + 1) * run; ++n) dropped += 1 - plan[n];
    stage.counts[thread] = dropped;
  });
  sum_groups(team, stage);
  team.each([&](int thread) {
    uint32_t dropped = sum_before(stage, thread);
    for (int n = thread * run; n < visual && n < (thread + 1) * run; ++n) {
      int32_t const keep = plan[n];
      plan[n] = static_cast<int32_t>(2 * dropped) + keep;
      if (keep) kept_visual_index[n - static_cast<int>(dropped)] = visual_index[n] - static_cast<int64_t>(dropped);
      dropped += 1 - keep;
    }
    if (thread == 0) plan[visual] = 2 * (visual - kept);
  });
}

// Output row of `position`, or -1 if it is dropped. That the row is one of `rows` only bites where visual_index breaks
// its contract: memory outside the outputs must not be touched even then.
EP_HD int64_t output_row(int64_t position, int visual, int64_t const* visual_index, int32_t const* plan, int64_t rows) {
  int const n = first_not_below(visual, position, [&](int i) { return visual_index[i]; });
  bool const is_visual = n < visual && visual_index[n] == position;
  if (is_visual && plan[n] % 2 == 0) return -1;
  int64_t const row = position - plan[n] / 2;
  return 0 <= row && row < rows ? row : -1;
}

}  // namespace ep_export
