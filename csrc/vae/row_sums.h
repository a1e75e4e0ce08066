// Sums of consecutive values by rows of `event` elements, for a piece of a flat array; see reparameterize_cpu.h.
#pragma once

#include <cstdint>

#include "vae/reparameterize_cpu.h"

namespace genfast {
namespace {

template <typename Out>
class RowSums {
 public:
  RowSums(Out* out, int64_t event, int64_t begin, KlPartials* partials)
      : out_(out),
        event_(event),
        row_(begin / event),
        row_end_((row_ + 1) * event),
        whole_(begin % event == 0),
        partials_(partials) {
    partials->head = partials->tail = 0.0;
  }

  // Adds the values of elements [position, position + count); segment(i, n) sums values i ... i + n - 1 of them.
  template <typename Segment>
  void add(int64_t position, int64_t count, const Segment& segment) {
    int64_t done = 0;
    while (done < count) {
      const int64_t left = row_end_ - (position + done);
      const int64_t part = left < count - done ? left : count - done;
      total_ += segment(done, part);
      row_open_ = true;
      done += part;
      if (position + done == row_end_) end_row();
    }
  }

  // Hands over what is left of a row that goes on in the next piece.
  void finish() {
    if (row_open_) (whole_ ? partials_->tail : partials_->head) = total_;
  }

 private:
  void end_row() {
    if (whole_) {
      out_[row_] = static_cast<Out>(total_);
    } else {
      partials_->head = total_;
    }
    ++row_;
    row_end_ += event_;
    total_ = 0.0;
    whole_ = true;
    row_open_ = false;
  }

  Out* out_;
  int64_t event_, row_, row_end_;
  bool whole_;
  bool row_open_ = false;
  KlPartials* partials_;
  double total_ = 0.0;
};

}  // namespace
}  // namespace genfast
