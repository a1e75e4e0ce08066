// Hands pieces of the work to threads; see row_pieces.h.
#include "common/memory.h"
#include "vae/reparameterize_cpu.h"
#include "vae/row_pieces.h"

namespace genfast {
namespace cpu {
namespace {

// 64 KiB an array in float32: a piece's inputs and outputs stay in the second cache.
constexpr int64_t kPiece = 16384;

template <typename Run>
void for_pieces(const ReparameterizeShape& shape, void* kl, int threads, const Run& run) {
  for_row_pieces(shape.rows, shape.event, kPiece, shape.dtype == DType::kFloat64, kl, threads,
                 [&](int64_t, int64_t begin, int64_t end, KlPartials* partials) { run(begin, end, partials); });
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
