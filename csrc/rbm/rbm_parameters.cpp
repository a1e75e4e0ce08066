#include "rbm/rbm_parameters.h"

#include <algorithm>

#include "common/gemm/gemm.h"

namespace genfast {
namespace {

// `values` [count] padded with zeros, or zeros.
const float* padded(const float* values, int64_t count, Workspace& workspace) {
  const int64_t stride = padded_stride(count);
  float* out = workspace.take(stride);
  if (values != nullptr) std::copy(values, values + count, out);
  std::fill(values == nullptr ? out : out + count, out + stride, 0.0f);
  return out;
}

}  // namespace

RbmSide rbm_side(const RbmParameters& p, bool up) {
  RbmSide side = {};
  side.kind = up ? p.hidden_kind : p.visible_kind;
  side.categories = up ? p.hidden_categories : p.visible_categories;
  side.units = up ? p.hidden : p.visible;
  side.depth = up ? p.visible : p.hidden;
  side.rounded = p.rounded;
  side.pairs = p.rounded && use_bfloat16_pairs();
  side.state_dtype = p.dtype;
  return side;
}

int64_t rbm_side_floats(const RbmParameters& p, bool up) {
  const int64_t units = up ? p.hidden : p.visible, depth = up ? p.visible : p.hidden;
  return cpu::packed_floats(depth, units) + 2 * padded_stride(units) + 64;
}

RbmSide rbm_prepare(const RbmParameters& p, bool up, Workspace& workspace, int threads) {
  RbmSide side = rbm_side(p, up);
  side.bias = padded(up ? p.c : p.b, side.units, workspace);
  const bool gaussian = !up && side.kind == UnitKind::kGaussian && p.deviation != nullptr;
  side.deviation = gaussian ? padded(p.deviation, side.units, workspace) : nullptr;
  float* panels = workspace.take(cpu::packed_floats(side.depth, side.units));
  const Pack pack = {p.dtype, p.W,       p.visible, p.hidden, !up, p.rounded, up ? p.inverse_variance : nullptr,
                     panels,  side.pairs};
  cpu::pack(pack, threads);
  side.panels = panels;
  side.parts = pack.parts();
  return side;
}

}  // namespace genfast
