// Cuts [rows, event] into pieces of fixed size, whatever the number of threads, and adds the partial row sums in order.
// Only files compiled for the baseline instruction set include this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "vae/reparameterize_cpu.h"

namespace genfast {

inline int64_t pieces_of(int64_t elements, int64_t piece) { return (elements + piece - 1) / piece; }
inline int64_t piece_end(int64_t index, int64_t elements, int64_t piece) {
  return (index + 1) * piece < elements ? (index + 1) * piece : elements;
}

template <typename Out>
void combine_pieces(const std::vector<KlPartials>& partials, int64_t event, int64_t elements, int64_t piece, Out* out) {
  double carried = 0.0;
  for (int64_t index = 0; index < static_cast<int64_t>(partials.size()); ++index) {
    const int64_t begin = index * piece, end = piece_end(index, elements, piece);
    if (begin % event != 0) {
      carried += partials[static_cast<size_t>(index)].head;
      const int64_t row = begin / event;
      if ((row + 1) * event > end) continue;  // the row goes on beyond this piece
      out[row] = static_cast<Out>(carried);
    }
    carried = partials[static_cast<size_t>(index)].tail;
  }
}

// Runs run(slot, begin, end, partials) on every piece, then completes `sums` ([rows], float64 where `wide` and float32
// otherwise; may be null).
template <typename Run>
void for_row_pieces(int64_t rows, int64_t event, int64_t piece, bool wide, void* sums, int threads, const Run& run) {
  const int64_t elements = rows * event;
  if (elements == 0) {
    const int64_t width = wide ? 8 : 4;
    for (int64_t i = 0; sums != nullptr && i < rows * width; ++i) static_cast<char*>(sums)[i] = 0;
    return;
  }
  const int64_t count = pieces_of(elements, piece);
  std::vector<KlPartials> partials(static_cast<size_t>(count));
  parallel_slots(count, threads, [&](int64_t slot, int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      run(slot, index * piece, piece_end(index, elements, piece), &partials[static_cast<size_t>(index)]);
    }
  });
  if (sums == nullptr) return;
  if (wide) {
    combine_pieces(partials, event, elements, piece, static_cast<double*>(sums));
  } else {
    combine_pieces(partials, event, elements, piece, static_cast<float*>(sums));
  }
}

}  // namespace genfast
