// The pieces of work that reparameterize.cpp hands to threads: flat elements [begin, end) of [rows, event].
//
// A piece writes kl of the rows that lie wholly inside it. Where its first row began earlier, or its last row ends
// later, the partial sums go to `head` and `tail` (one row inside a longer one counts as head), and reparameterize.cpp
// adds them in order: sums do not depend on the number of threads.
#pragma once

#include "common/cpu_features.h"
#include "vae/reparameterize.h"

namespace genfast {

struct KlPartials {
  double head, tail;
};

using ForwardPiece = void(const ReparameterizeForward&, int64_t begin, int64_t end, KlPartials*);
using BackwardPiece = void(const ReparameterizeBackward&, int64_t begin, int64_t end);
using JvpPiece = void(const ReparameterizeJvp&, int64_t begin, int64_t end, KlPartials*);

GENFAST_DECLARE_PER_ISA(void, reparameterize_forward_piece,
                        (const ReparameterizeForward&, int64_t begin, int64_t end, KlPartials*))
GENFAST_DECLARE_PER_ISA(void, reparameterize_backward_piece,
                        (const ReparameterizeBackward&, int64_t begin, int64_t end))
GENFAST_DECLARE_PER_ISA(void, reparameterize_jvp_piece,
                        (const ReparameterizeJvp&, int64_t begin, int64_t end, KlPartials*))

// float64, by the C library: the same on every instruction set.
void reparameterize_forward_double(const ReparameterizeForward&, int64_t begin, int64_t end, KlPartials*);
void reparameterize_backward_double(const ReparameterizeBackward&, int64_t begin, int64_t end);
void reparameterize_jvp_double(const ReparameterizeJvp&, int64_t begin, int64_t end, KlPartials*);

}  // namespace genfast
