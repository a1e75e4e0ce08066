// Hands pieces of the work to threads; see row_pieces.h.
#include "vae/log_likelihood.h"

#include <atomic>
#include <vector>

#include "common/memory.h"
#include "vae/log_likelihood_cpu.h"
#include "vae/row_pieces.h"

namespace genfast {
namespace cpu {
namespace {

constexpr int64_t kPiece = 16384;  // elements of the parameters, about

bool by_planes(Likelihood likelihood) {
  return likelihood == Likelihood::kCategorical || likelihood == Likelihood::kDiscretizedLogisticMixture;
}

// A whole number of blocks, so that pieces end where blocks do.
int64_t piece_of_planes(int64_t planes) {
  const int64_t block = block_of_planes(planes), blocks = kPiece / (planes > 0 ? planes : 1) / block;
  return (blocks > 1 ? blocks : 1) * block;
}

}  // namespace

bool log_likelihood(const LogLikelihood& args, int threads) {
  const bool wide = args.dtype == DType::kFloat64, planes = by_planes(args.likelihood);
  advise_huge_pages(args.to_params, args.rows * args.planes * args.size * bytes_of(args.dtype));
  advise_huge_pages(args.to_shared, args.rows * args.size * (wide ? 8 : 4));
  LogLikelihoodPiece* piece = wide     ? &log_likelihood_double
                              : planes ? GENFAST_FOR_ISA(log_likelihood_planes_piece)
                                       : GENFAST_FOR_ISA(log_likelihood_piece);
  // Room for the components of a mixture comes after the planes.
  const int64_t room = planes && !wide ? args.planes * (block_of_planes(args.planes) + 16) : 0;
  std::vector<float> scratch(static_cast<size_t>(room * (threads > 1 ? threads : 1)));
  std::atomic<bool> valid{true};
  for_row_pieces(args.rows, args.size, planes ? piece_of_planes(args.planes) : kPiece, wide, args.value, threads,
                 [&](int64_t slot, int64_t begin, int64_t end, KlPartials* partials) {
                   if (!piece(args, begin, end, scratch.data() + slot * room, partials)) {
                     valid.store(false, std::memory_order_relaxed);
                   }
                 });
  return valid.load();
}

void scale_rows(const ScaleRows& args, int threads) {
  ScaleRowsPiece* piece = GENFAST_FOR_ISA(scale_rows_piece);
  const int64_t elements = args.rows * args.event;
  parallel_for(pieces_of(elements, kPiece), threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      piece(args, index * kPiece, piece_end(index, elements, kPiece));
    }
  });
}

}  // namespace cpu
}  // namespace genfast
