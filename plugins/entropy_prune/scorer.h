// What both score paths share: the scorers, the limits, and the constants of their definitions.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "team.h"

namespace ep_export {

constexpr int kMaxHeads = 64;
constexpr int kMaxDim = 256;

// README.md defines them. paper and order2 divide each centred row by its norm, released does not, norm does not
// centre.
enum class Scorer : int32_t { kPaper = 0, kReleased = 1, kOrder2 = 2, kNorm = 3 };

EP_HD float not_a_number() { return NAN; }

EP_HD float clamp_finite(float x) { return fminf(fmaxf(x, -FLT_MAX), FLT_MAX); }

// The released code's floor under every eigenvalue.
constexpr float kReleasedFloor = 1e-10f;
constexpr float kReleasedFloorTerm = 2.30258509e-9f;  // -1e-10 ln 1e-10

// Sum of `count` terms by four interleaved accumulators, which rounds less than one and does not wait for itself.
// `add(i, sum)` returns the sum with term i added.
template <class Add>
EP_HD float sum_terms(int count, Add add) {
  float sums[4] = {0.f, 0.f, 0.f, 0.f};
  int i = 0;
  for (; i + 3 < count; i += 4) {
    EP_UNROLL
    for (int j = 0; j < 4; ++j) sums[j] = add(i + j, sums[j]);
  }
  for (; i < count; ++i) sums[0] = add(i, sums[0]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace ep_export
