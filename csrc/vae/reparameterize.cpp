// Cuts the work into pieces of fixed size, whatever the number of threads, and adds the partial row sums in order.
#include <cstddef>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "vae/reparameterize_cpu.h"

namespace genfast {
namespace cpu {
namespace {

// 64 KiB an array in float32: a piece's inputs and outputs stay in the second cache.
constexpr int64_t kPiece = 16384;

int64_t pieces_of(int64_t elements) { return (elements + kPiece - 1) / kPiece; }
int64_t piece_end(int64_t piece, int64_t elements) {
  return (piece + 1) * kPiece < elements ? (piece + 1) * kPiece : elements;
}

template <typename Out>
void combine(const std::vector<KlPartials>& partials, int64_t event, int64_t elements, Out* kl) {
  double carried = 0.0;
  for (int64_t piece = 0; piece < static_cast<int64_t>(partials.size()); ++piece) {
    const int64_t begin = piece * kPiece, end = piece_end(piece, elements);
    if (begin % event != 0) {
      carried += partials[piece].head;
      const int64_t row = begin / event;
      if ((row + 1) * event > end) continue;  // the row goes on beyond this piece
      kl[row] = static_cast<Out>(carried);
    }
    carried = partials[piece].tail;
  }
}

// Runs run(begin, end, partials) on every piece, then completes `kl` where it is wanted.
template <typename Run>
void for_pieces(const ReparameterizeShape& shape, void* kl, int threads, const Run& run) {
  const int64_t elements = shape.rows * shape.event;
  if (elements == 0) {
    const int64_t width = shape.dtype == DType::kFloat64 ? 8 : 4;
    for (int64_t i = 0; kl != nullptr && i < shape.rows * width; ++i) static_cast<char*>(kl)[i] = 0;
    return;
  }
  std::vector<KlPartials> partials(static_cast<size_t>(pieces_of(elements)));
  parallel_for(pieces_of(elements), threads, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      run(piece * kPiece, piece_end(piece, elements), &partials[static_cast<size_t>(piece)]);
    }
  });
  if (kl == nullptr) return;
  if (shape.dtype == DType::kFloat64) {
    combine(partials, shape.event, elements, static_cast<double*>(kl));
  } else {
    combine(partials, shape.event, elements, static_cast<float*>(kl));
  }
}

}  // namespace

void reparameterize_forward(const ReparameterizeForward& args, int threads) {
  const ReparameterizeShape& shape = args.shape;
  advise_huge_pages(args.z, shape.samples * shape.rows * shape.event * bytes_of(shape.dtype));
  ForwardPiece* piece =
      shape.dtype == DType::kFloat64 ? &reparameterize_forward_double : GENFAST_FOR_ISA(reparameterize_forward_piece);
  for_pieces(shape, args.kl, threads,
             [&](int64_t begin, int64_t end, KlPartials* partials) { piece(args, begin, end, partials); });
}

void reparameterize_backward(const ReparameterizeBackward& args, int threads) {
  const ReparameterizeShape& shape = args.shape;
  const int64_t bytes = shape.rows * shape.event * bytes_of(shape.dtype);
  advise_huge_pages(args.dmu, bytes);
  advise_huge_pages(args.dlogvar, bytes);
  BackwardPiece* piece =
      shape.dtype == DType::kFloat64 ? &reparameterize_backward_double : GENFAST_FOR_ISA(reparameterize_backward_piece);
  for_pieces(shape, nullptr, threads, [&](int64_t begin, int64_t end, KlPartials*) { piece(args, begin, end); });
}

void reparameterize_jvp(const ReparameterizeJvp& args, int threads) {
  const ReparameterizeShape& shape = args.shape;
  advise_huge_pages(args.z_tangent, shape.samples * shape.rows * shape.event * bytes_of(shape.dtype));
  JvpPiece* piece =
      shape.dtype == DType::kFloat64 ? &reparameterize_jvp_double : GENFAST_FOR_ISA(reparameterize_jvp_piece);
  for_pieces(shape, args.kl_tangent, threads,
             [&](int64_t begin, int64_t end, KlPartials* partials) { piece(args, begin, end, partials); });
}

}  // namespace cpu
}  // namespace genfast
