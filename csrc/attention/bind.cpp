#include <pybind11/stl.h>

#include <array>

#include "attention/attention.h"
#include "bindings.h"

namespace genfast {

namespace {

using Address = uintptr_t;
using Strides3 = std::array<int64_t, 4>;  // address, then strides of batch, head and row
using Strides4 = std::array<int64_t, 4>;
using Shape = std::array<int64_t, 7>;

Rows rows_of(const Strides3& x) { return {pointer(static_cast<uintptr_t>(x[0])), x[1], x[2], x[3]}; }

void copy(const Strides4& from, int64_t (&to)[4]) {
  for (size_t i = 0; i < 4; ++i) to[i] = from[i];
}

Attention attention_of(int dtype, const Shape& shape, const Strides3& q, const Strides3& k, const Strides3& v,
                       const Strides3& out, Address lse, Address bias, const Strides4& bias_stride, Address table,
                       int64_t table_batch, int64_t table_head, int64_t table_length, Address q_index, Address k_index,
                       Address mask, const Strides4& mask_stride, Address sinks, double scale, double softcap,
                       uint32_t dropout_threshold, double dropout_factor, uint64_t seed, int64_t left, int64_t right,
                       int64_t shift, int64_t batch_offset, Address q_starts, Address k_starts, bool bottom_right) {
  Attention a = {};
  a.dtype = static_cast<DType>(dtype);
  a.batch = shape[0];
  a.heads = shape[1];
  a.kv_heads = shape[2];
  a.queries = shape[3];
  a.keys = shape[4];
  a.depth = shape[5];
  a.value_depth = shape[6];
  a.q = rows_of(q);
  a.k = rows_of(k);
  a.v = rows_of(v);
  a.out = rows_of(out);
  a.lse = pointer<const float>(lse);
  a.bias = pointer(bias);
  copy(bias_stride, a.bias_stride);
  a.table = pointer<const float>(table);
  a.table_batch = table_batch;
  a.table_head = table_head;
  a.table_length = table_length;
  a.q_index = pointer<const int32_t>(q_index);
  a.k_index = pointer<const int32_t>(k_index);
  a.mask = pointer<const uint8_t>(mask);
  copy(mask_stride, a.mask_stride);
  a.sinks = pointer<const float>(sinks);
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.dropout_threshold = dropout_threshold;
  a.dropout_factor = static_cast<float>(dropout_factor);
  a.seed = seed;
  a.left = left;
  a.right = right;
  a.shift = shift;
  a.batch_offset = batch_offset;
  a.q_starts = pointer<const int64_t>(q_starts);
  a.k_starts = pointer<const int64_t>(k_starts);
  a.bottom_right = bottom_right;
  return a;
}

AttentionTangent tangent_of(const Attention& a, const Strides3& q, const Strides3& k, const Strides3& v, Address bias,
                            const Strides4& bias_stride, Address table, Address sinks, const Strides3& out,
                            Address lse) {
  AttentionTangent t = {};
  t.a = a;
  t.q = rows_of(q);
  t.k = rows_of(k);
  t.v = rows_of(v);
  t.bias = pointer(bias);
  copy(bias_stride, t.bias_stride);
  t.table = pointer<const float>(table);
  t.sinks = pointer<const float>(sinks);
  t.out = rows_of(out);
  t.lse = pointer<float>(lse);
  return t;
}

}  // namespace

void bind_attention(pybind11::module_& cpu) {
  const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
  pybind11::class_<Attention>(cpu, "Attention").def(pybind11::init(&attention_of));
  pybind11::class_<AttentionTangent>(cpu, "AttentionTangent").def(pybind11::init(&tangent_of));
  cpu.def("attention_splits", &cpu::attention_splits);
  cpu.def(
      "attention_forward",
      [](const Attention& a, Address lse, int threads) { cpu::attention_forward({a, pointer<float>(lse)}, threads); },
      release);
  cpu.def(
      "attention_decode",
      [](const Attention& a, Address lse, Address lengths, Address blocks, int64_t blocks_stride, int64_t page_size,
         int64_t splits, Address partial, int threads) {
        const AttentionDecode args = {a,
                                      pointer<float>(lse),
                                      pointer<const int64_t>(lengths),
                                      pointer<const int32_t>(blocks),
                                      blocks_stride,
                                      page_size,
                                      splits,
                                      pointer<float>(partial)};
        cpu::attention_decode(args, threads);
      },
      release);
  cpu.def(
      "attention_append",
      [](int dtype, const Strides3& rows, const Strides3& cache, int64_t batch, int64_t heads, int64_t count,
         int64_t width, Address lengths, Address blocks, int64_t blocks_stride, int64_t page_size) {
        cpu::attention_append({static_cast<DType>(dtype), rows_of(rows), rows_of(cache), batch, heads, count, width,
                               pointer<const int64_t>(lengths), pointer<const int32_t>(blocks), blocks_stride,
                               page_size});
      },
      release);
  cpu.def("attention_tangent", &cpu::attention_tangent, release);
  cpu.def(
      "attention_gradient",
      [](const Attention& a, const Strides3& dout, Address dlse, const Strides3& dq, const Strides3& dk,
         const Strides3& dv, int bias_gradient, Address dbias, int64_t bias_batch, int64_t bias_heads, Address dtable,
         Address dq_partial, int64_t splits, const AttentionTangent* tangent, int threads) {
        AttentionGradient args = {};
        args.a = a;
        args.dout = rows_of(dout);
        args.dlse = pointer<const float>(dlse);
        args.dq = rows_of(dq);
        args.dk = rows_of(dk);
        args.dv = rows_of(dv);
        args.bias_gradient = static_cast<BiasGradient>(bias_gradient);
        args.dbias = pointer(dbias);
        args.bias_batch = bias_batch;
        args.bias_heads = bias_heads;
        args.dtable = pointer<float>(dtable);
        args.dq_partial = pointer<float>(dq_partial);
        args.splits = splits;
        args.second = tangent != nullptr;
        if (tangent != nullptr) args.t = *tangent;
        cpu::attention_gradient(args, threads);
      },
      release);
}

}  // namespace genfast
