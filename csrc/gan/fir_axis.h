// One axis of an upsampling, filtering and downsampling, split into the phases of its outputs.
//
//   y[o] = sum_k g[k] z[o down + k - pad],   z[up i] = x[i]
//
// With U = up / gcd(up, down) and D = down / gcd(up, down), output o = U q + r needs the consecutive inputs
// D q + first[r] + j, j < count[r], with weights that depend on r alone: only the taps that meet samples are visited.
//
// The kernels keep a row of inputs as D arrays of `pitch` elements, array p with the inputs p, D + p, 2 D + p, ...
// counted from input D (q0 + low) on, q0 the first q of a tile: input D q + first + j is then offsets[j] + q - q0.
#pragma once

#include <cstdint>

namespace genfast {

template <typename A>
struct FirPhase {
  int64_t first, count;
  const A* weights;
  const int64_t* offsets;
};

template <typename A>
struct FirAxis {
  int64_t outputs, inputs;  // sizes
  int64_t up, down;         // U and D
  int64_t groups;           // of q
  int64_t low, reach;       // inputs D (q + low) ... D (q + low + reach) - 1 are all that q needs
  int64_t taps;             // of every phase, 0 where they differ
  int64_t tile, pitch;      // q's of a tile
  int64_t buffer;           // elements: D pitch
  const FirPhase<A>* phases;
};

}  // namespace genfast
