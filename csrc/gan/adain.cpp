// Hands whole planes to threads, so that results do not depend on their number.
#include "gan/adain.h"

#include "common/memory.h"
#include "common/parallel.h"
#include "gan/adain_cpu.h"

namespace genfast {
namespace cpu {
namespace {

int threads_for(const InstanceNorm& args, int threads) { return args.planes * args.size < 16384 ? 1 : threads; }

}  // namespace

void instance_norm(const InstanceNorm& args, int threads) {
  advise_huge_pages(args.out, args.planes * args.size * bytes_of(args.dtype));
  auto* const run = GENFAST_FOR_ISA(instance_norm_planes);
  parallel_for(args.planes, threads_for(args, threads), [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

void instance_norm_backward(const InstanceNorm& args, int threads) {
  advise_huge_pages(args.out, args.planes * args.size * bytes_of(args.dtype));
  auto* const run = GENFAST_FOR_ISA(instance_norm_backward_planes);
  parallel_for(args.planes, threads_for(args, threads), [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace cpu
}  // namespace genfast
