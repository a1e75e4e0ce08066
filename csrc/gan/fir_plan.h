// Makes the phases of an axis (fir_axis.h). For files of the baseline instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "gan/fir_axis.h"

namespace genfast {

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && a < 0 ? 1 : 0); }  // b > 0

template <typename A>
class FirPlan {
 public:
  // taps: as they correlate, first one first. tile: about so many elements of a row at a time.
  FirPlan(const std::vector<double>& taps, int64_t inputs, int64_t outputs, int64_t up, int64_t down, int64_t pad,
          int64_t tile) {
    const int64_t common = std::gcd(up, down), count = static_cast<int64_t>(taps.size());
    axis_.inputs = inputs, axis_.outputs = outputs, axis_.up = up / common, axis_.down = down / common;
    std::vector<std::size_t> starts;
    int64_t lowest = 0, highest = -1;
    for (int64_t r = 0; r < axis_.up; ++r) {
      const int64_t at = r * down - pad, first_tap = ((-at) % up + up) % up;  // at + first_tap is a multiple of up
      FirPhase<A> phase = {};
      phase.first = floor_div(at + first_tap, up);
      starts.push_back(weights_.size());
      for (int64_t k = first_tap; k < count; k += up)
        weights_.push_back(static_cast<A>(taps[static_cast<std::size_t>(k)]));
      phase.count = static_cast<int64_t>(weights_.size() - starts.back());
      if (phase.count != 0) {
        const int64_t last = phase.first + phase.count - 1;
        const bool none = lowest > highest;
        lowest = none || phase.first < lowest ? phase.first : lowest;
        highest = none || last > highest ? last : highest;
      }
      phases_.push_back(phase);
    }
    axis_.taps = phases_[0].count;
    for (const FirPhase<A>& phase : phases_) axis_.taps = phase.count == axis_.taps ? axis_.taps : 0;
    axis_.groups = (outputs + axis_.up - 1) / axis_.up;
    axis_.low = floor_div(lowest, axis_.down);
    axis_.reach = floor_div(highest, axis_.down) - axis_.low + 1;
    constexpr int64_t kLanes = 16;  // of the widest vector; tiles start on its multiples
    const int64_t wide = axis_.up > axis_.down ? axis_.up : axis_.down;
    axis_.tile = (tile / wide + kLanes) / kLanes * kLanes;
    if (axis_.tile > axis_.groups) axis_.tile = (axis_.groups + kLanes - 1) / kLanes * kLanes;
    axis_.pitch = (axis_.tile + axis_.reach + 4 * kLanes) / kLanes * kLanes;
    axis_.buffer = axis_.down * axis_.pitch;
    offsets_.resize(weights_.size());
    for (std::size_t r = 0; r < phases_.size(); ++r) {
      phases_[r].weights = weights_.data() + starts[r];
      phases_[r].offsets = offsets_.data() + starts[r];
      for (int64_t j = 0; j < phases_[r].count; ++j) {
        const int64_t input = phases_[r].first + j, group = floor_div(input, axis_.down);
        offsets_[starts[r] + static_cast<std::size_t>(j)] =
            (input - group * axis_.down) * axis_.pitch + group - axis_.low;
      }
    }
    axis_.phases = phases_.data();
  }
  FirPlan(const FirPlan&) = delete;
  FirPlan& operator=(const FirPlan&) = delete;

  const FirAxis<A>& axis() const { return axis_; }

 private:
  FirAxis<A> axis_ = {};
  std::vector<FirPhase<A>> phases_;
  std::vector<A> weights_;
  std::vector<int64_t> offsets_;
};

}  // namespace genfast
