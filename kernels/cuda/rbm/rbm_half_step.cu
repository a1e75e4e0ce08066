// One half of a Gibbs step in one pass; csrc/rbm/rbm_half_step_cuda.h states the contract.
//
//   x = states W + bias (W transposed towards the visible side), then csrc/rbm/rbm_rows.h's conditional of each unit
//
// Floor: 2 rows V H FLOP for each product of parts; bytes: the states, W and the outputs.
// Tiling: rbm_product.cuh makes the products of a tile of chains and units on tensor cores (mma m16n8k16, bfloat16 to
// float32). A thread of that layout holds two neighbouring units in two rows, half of what a Philox call draws; so the
// tile goes through the shared memory that the ring no longer needs, and each thread takes four neighbours from it
// (rbm_draw.cuh): one Philox call, one store, and the eight threads that hold 32 units sum them by shuffles.
#include "rbm/rbm_half_step.cuh"
#include "rbm/rbm_launch.cuh"

namespace genfast {
namespace cuda {
namespace {

constexpr const char* kHalfStep = "rbm_half_step";

int processors() { return device_attribute(kHalfStep, cudaDevAttrMultiProcessorCount); }

template <typename Tile>
int64_t tiles_of(const RbmDraw& draw) {
  return ((draw.rows + Tile::kRows - 1) / Tile::kRows) * ((draw.units + Tile::kUnits - 1) / Tile::kUnits);
}

template <typename Tile>
void launch_tile(const RbmHalfStepCuda& args, void* stream) {
  const auto kernel = args.up ? half_step_kernel<Tile, true> : half_step_kernel<Tile, false>;
  launch_grid(kHalfStep, kernel, tiles_of<Tile>(args.draw), Tile::kThreads, Tile::kSharedBytes, false, args, stream);
}

// The largest tile that gives every processor one.
template <typename Large, typename Middle, typename Small>
void launch_best(const RbmHalfStepCuda& args, void* stream) {
  const int wanted = processors();
  if (tiles_of<Large>(args.draw) >= wanted) return launch_tile<Large>(args, stream);
  if (tiles_of<Middle>(args.draw) >= wanted) return launch_tile<Middle>(args, stream);
  launch_tile<Small>(args, stream);
}

}  // namespace

void rbm_prepare(const RbmPrepare& args, void* stream) {
  if (args.rows < 0 || args.columns < 0 || args.parts < 1 || args.parts > split::kMostParts || args.stride % 8 != 0 ||
      args.stride < args.columns || args.dtype == DType::kFloat64) {
    throw std::invalid_argument("rbm_prepare: a negative size, no 1 to 3 parts, a bad stride or float64");
  }
  if (args.rows == 0 || args.columns == 0) return;
  const int64_t blocks = std::min<int64_t>((args.rows + 7) / 8, int64_t{processors()} * 8);
  const auto kernel = args.parts == 1 ? prepare_kernel<1> : args.parts == 2 ? prepare_kernel<2> : prepare_kernel<3>;
  launch_grid("rbm_prepare", kernel, blocks, kPrepareThreads, 0, false, args, stream);
}

void rbm_half_step(const RbmHalfStepCuda& args, void* stream) {
  const RbmDraw& draw = args.draw;
  const int64_t units = args.up ? args.hidden : args.visible;
  if (draw.rows < 0 || args.visible <= 0 || args.hidden <= 0 || draw.units != units) {
    throw std::invalid_argument("rbm_half_step: a negative size, or units that do not fit W");
  }
  if (draw.kind == UnitKind::kSoftmax || (draw.kind != UnitKind::kBernoulli && draw.kind != UnitKind::kGaussian)) {
    throw std::invalid_argument("rbm_half_step: the CUDA kernels draw bernoulli and gaussian units");
  }
  for (const RbmOperand* operand : {&args.weights, &args.x}) {
    if (operand->parts < 1 || operand->parts > split::kMostParts || operand->stride % 8 != 0 ||
        operand->part_stride % 8 != 0 || reinterpret_cast<uintptr_t>(operand->data) % 16 != 0) {
      throw std::invalid_argument("rbm_half_step: an operand is not 1 to 3 parts of aligned rows");
    }
  }
  if (draw.rows == 0) return;
  if (args.x.parts == 1 && args.weights.parts == 1) {
    return launch_best<ProductTile<1, 1, 128, 128, 2, 2, 4>, ProductTile<1, 1, 64, 64, 2, 2, 4>,
                       ProductTile<1, 1, 32, 32, 2, 2, 6>>(args, stream);
  }
  if (args.x.parts == 1) {
    return launch_best<ProductTile<1, 3, 128, 128, 2, 4, 3>, ProductTile<1, 3, 64, 64, 2, 2, 4>,
                       ProductTile<1, 3, 32, 32, 2, 2, 6>>(args, stream);
  }
  launch_best<ProductTile<3, 3, 128, 128, 2, 4, 2>, ProductTile<3, 3, 64, 64, 2, 2, 3>,
              ProductTile<3, 3, 32, 32, 2, 2, 4>>(args, stream);
}

}  // namespace cuda
}  // namespace genfast
