// Entropy of the spectrum of a small symmetric matrix, without its eigenvalues.
//
// In:  a positive semidefinite matrix whose row `lane + 32 r` sits in the registers `a[r][.]` of one lane of a warp.
// Out: d and e2, the diagonal and squared off-diagonal of an orthogonally similar tridiagonal matrix T, and the entropy
//      -sum x ln x of the eigenvalues x of T / tr T, in nats.
//
// Geometry: one warp a matrix, 2 <= n <= 64. Accumulation: fp32 fused multiply-adds; no fp64 anywhere.
//
// Why no eigenvalues. With sum x = 1,
//     -sum x ln x = integral over u of t (y(t) - 1 / (1 + t)),   t = e^u,   y(t) = sum x / (x + t) = tr T (T + t)^-1,
// and the integrand is analytic for |Im u| < pi, so the trapezoidal rule with step h errs by exp(-2 pi^2 / h). With 32
// nodes from 2^-33 to 2^13.5 (h = 1.5 ln 2) and the leading term of the tail the error is below 1e-7 nats (measured
// over random spectra of 1 to 64 eigenvalues between 1e-12 and 1). A node is a lane and costs one pass over T, where
// bisection costs about 29 passes.
#pragma once

#include <cmath>

#include "team.h"

namespace ep_export {

// What one lane of the warp holds. kRows is the number of heads rounded up to 16, 32 or 64.
template <int kRows>
struct Lane {
  static constexpr int kOwned = (kRows + kWarpLanes - 1) / kWarpLanes;  // rows of the matrix a lane owns
  static constexpr int kTileRows = kRows / 4;                           // Gram tile: lanes form a grid of 4 x 8
  static constexpr int kTileCols = kRows / 8;
  float tile[kTileRows][kTileCols];
  float a[kOwned][kRows];
  float v[kOwned];
  float p[kOwned];
};

// Vectors of one matrix in shared memory, 16-byte aligned.
template <int kRows>
struct alignas(16) Vectors {
  float v[kRows];
  float w[kRows];
  float d[kRows];
  float e2[kRows];
};

// A <- P A P with the reflection P = I - beta v v^T; v is in `vectors.v`, zero before column `first`.
template <int kRows, class Team>
EP_HD void reflect(Team& team, Vectors<kRows>& vectors, float beta, int first, int n) {
  using L = Lane<kRows>;
  team.each([&](int lane, L& own) {
    EP_UNROLL
    for (int r = 0; r < L::kOwned; ++r) {
      int const row = lane + kWarpLanes * r;
      float sums[4] = {0.f, 0.f, 0.f, 0.f};
      EP_UNROLL
      for (int j = 0; j < kRows; j += 4) {
        if (j + 3 < first || j >= n) continue;  // uniform: columns outside hold zeros or are done
        float v[4];
        copy_floats<4>(v, vectors.v + j);
        EP_UNROLL
        for (int i = 0; i < 4; ++i) sums[i] = fmaf(own.a[r][j + i], v[i], sums[i]);
      }
      own.v[r] = row < kRows ? vectors.v[row] : 0.f;
      own.p[r] = beta * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
  });
  float const half = 0.5f * beta * team.sum([&](int, L& own) {
    float dot = 0.f;
    EP_UNROLL
    for (int r = 0; r < L::kOwned; ++r) dot = fmaf(own.v[r], own.p[r], dot);
    return dot;
  });
  team.each([&](int lane, L& own) {
    EP_UNROLL
    for (int r = 0; r < L::kOwned; ++r) {
      int const row = lane + kWarpLanes * r;
      own.p[r] = fmaf(-half, own.v[r], own.p[r]);
      if (row < kRows) vectors.w[row] = own.p[r];
    }
  });
  team.each([&](int, L& own) {
    EP_UNROLL
    for (int j = 0; j < kRows; j += 4) {
      if (j + 3 < first || j >= n) continue;
      float v[4];
      float w[4];
      copy_floats<4>(v, vectors.v + j);
      copy_floats<4>(w, vectors.w + j);
      EP_UNROLL
      for (int r = 0; r < L::kOwned; ++r) {
        EP_UNROLL
        for (int i = 0; i < 4; ++i) {
          own.a[r][j + i] = fmaf(-own.v[r], w[i], fmaf(-own.p[r], v[i], own.a[r][j + i]));
        }
      }
    }
  });
}

// Maps the known null vector (in `vectors.v`, of squared length `length2` > 0) onto axis 0, whose row and column then
// are zero and can be left out. Without it the exact zero eigenvalue of a centred token would come back as rounding
// noise.
template <int kRows, class Team>
EP_HD void project_out(Team& team, Vectors<kRows>& vectors, float length2, int n) {
  using L = Lane<kRows>;
  float const length = sqrtf(length2);
  float const head = vectors.v[0];
  team.each([&](int, L&) {});  // every lane has read v[0]
  team.each([&](int lane, L&) {
    if (lane == 0) vectors.v[0] = head + copysignf(length, head);
  });
  reflect<kRows>(team, vectors, 1.f / (length * (length + fabsf(head))), 0, n);
}

// Householder reduction of rows and columns first..n-1; row k of A holds column k because A is symmetric.
template <int kRows, class Team>
EP_HD void tridiagonalise(Team& team, Vectors<kRows>& vectors, int first, int n) {
  using L = Lane<kRows>;
  for (int k = first; k < n; ++k) {
    team.each([&](int lane, L& own) {
      EP_UNROLL
      for (int r = 0; r < L::kOwned; ++r) {
        if (lane + kWarpLanes * r != k) continue;
        EP_UNROLL
        for (int j = 0; j < kRows; ++j) vectors.w[j] = own.a[r][j];
      }
    });
    float const next = k + 1 < n ? vectors.w[k + 1] : 0.f;
    float const rest2 = team.sum([&](int lane, L&) {
      float square = 0.f;
      EP_UNROLL
      for (int r = 0; r < L::kOwned; ++r) {
        int const row = lane + kWarpLanes * r;
        if (row > k + 1 && row < n) square = fmaf(vectors.w[row], vectors.w[row], square);
      }
      return square;
    });
    // Off-diagonals of 1e-15 against a trace of 1 change no entropy, and their squares would leave fp32's range.
    bool const done = rest2 <= 1e-30f;
    float const norm2 = done ? next * next : fmaf(next, next, rest2);
    float const norm = sqrtf(norm2);
    team.each([&](int lane, L&) {
      if (lane == 0) {
        vectors.d[k] = vectors.w[k];
        vectors.e2[k] = norm2;
      }
      EP_UNROLL
      for (int r = 0; r < L::kOwned; ++r) {
        int const row = lane + kWarpLanes * r;
        if (row >= kRows) continue;
        float const value = row == k + 1 ? next + copysignf(norm, next) : vectors.w[row];
        vectors.v[row] = row > k && row < n ? value : 0.f;
      }
    });
    if (!done) reflect<kRows>(team, vectors, 1.f / (norm * (norm + fabsf(next))), k + 1, n);
  }
}

// Number of eigenvalues of T[first..n) below x > 0: negative pivots of T - x (Sturm).
EP_HD int count_below(float const* d, float const* e2, int first, int n, float x) {
  int count = 0;
  float pivot = 1.f;
  for (int i = first; i < n; ++i) {
    pivot = d[i] - x - (i > first ? e2[i - 1] / pivot : 0.f);
    if (pivot == 0.f) pivot = -1e-30f;  // as if x were larger by less than a rounding
    count += pivot < 0.f;
  }
  return count;
}

struct Spectrum {
  float entropy;  // -sum x ln x over the eigenvalues x of T / tr T, in nats
  float trace;    // tr T
  float small;    // sum of t / (x + t) for t = 2^-18: how much of the spectrum is small enough to be noise
};

// Of T[first..n). All zero for a zero matrix.
template <int kRows, class Team>
EP_HD Spectrum spectral_entropy(Team& team, Vectors<kRows> const& vectors, int first, int n) {
  using L = Lane<kRows>;
  float const trace = team.sum([&](int lane, L&) {
    float total = 0.f;
    EP_UNROLL
    for (int r = 0; r < L::kOwned; ++r) {
      int const row = lane + kWarpLanes * r;
      if (row >= first && row < n) total += vectors.d[row];
    }
    return total;
  });
  if (!(trace > 0.f)) return {0.f, 0.f, 0.f};
  float const scale = 1.f / trace;
  float const square = scale * scale * team.sum([&](int lane, L&) {
    float total = 0.f;
    EP_UNROLL
    for (int r = 0; r < L::kOwned; ++r) {
      int const row = lane + kWarpLanes * r;
      if (row >= first && row < n) total = fmaf(vectors.d[row], vectors.d[row], total);
      if (row >= first && row + 1 < n) total = fmaf(2.f, vectors.e2[row], total);
    }
    return total;
  });
  constexpr float kStep = 1.03972077f;  // h = 1.5 ln 2
  constexpr float kTail =
      4.90833e-5f;  // h / (t_31 (e^h - 1)): the geometric tail beyond the last node, times 1 - sum x^2
  constexpr int kSecondOrderLane = 21;  // t = 2^-1.5
  constexpr int kSmallLane = 10;        // t = 2^-18
  float const body = team.sum([&](int lane, L& own) {
    // t = 2^(1.5 lane - 33), and its inverse, both from exact powers of two.
    int const whole = 3 * lane / 2 - 33;
    float const t = ldexpf(lane % 2 ? 1.41421356f : 1.f, whole);
    float const inverse = ldexpf(lane % 2 ? 0.70710678f : 1.f, -whole) * scale;
    // (T + t) / t has pivots 1 + z with z >= 0, and y is the sum of the shares s = g / (1 + z), 0 <= g <= z, where
    // g = -dz / d ln t: z is concave in t. Rounding that breaks a bound is cut off, so negative eigenvalues count as
    // zero. Where t is large, shares hide below the rounding of their sum; there the sum of d / t - s, which is second
    // order in d / t and has positive terms only, replaces it: t (y - 1 / (1 + t)) = 1 / (1 + t) - t sum (d / t - s).
    bool const second_order = lane >= kSecondOrderLane;
    float total = 0.f;
    float lost = 0.f;
    float reciprocal = 0.f;
    float share = 0.f;
    float e2 = 0.f;
    for (int i = first; i < n; ++i) {
      float const whole_share = vectors.d[i] * inverse;
      float const couple = e2 * inverse * inverse * reciprocal;
      float const z = fmaxf(whole_share - couple, 0.f);
      float const g = fmaxf(fmaf(-couple, 1.f - share, z), 0.f);
      reciprocal = 1.f / (1.f + z);
      float const missing = reciprocal * fmaf(whole_share, z, couple * (2.f - share));
      share = g * reciprocal;
      // Compensated: dozens of small eigenvalues next to a few large ones must not be rounded away one by one.
      float const term = (second_order ? missing : share) - lost;
      float const sum = total + term;
      lost = (sum - total) - term;
      total = sum;
      e2 = vectors.e2[i];
    }
    own.p[0] = static_cast<float>(n - first) - total;
    float const reference = 1.f / (1.f + t);
    return kStep * (second_order ? fmaf(-t, total, reference) : t * (total - reference));
  });
  float const small = team.max([&](int lane, L& own) { return lane == kSmallLane ? own.p[0] : 0.f; });
  return {fmaf(kTail, 1.f - square, body), trace, small};
}

}  // namespace ep_export
