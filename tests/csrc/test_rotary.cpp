// rotary: values, both orders of pairs, both directions, layouts, positions, threads, and what must stay untouched.
#include "check.h"
#include "isas.h"
#include "storage.h"
#include "transformer/rotary.h"

using genfast::DType;
using genfast::Rotary;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

std::vector<double> drawn(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> between(-2.0, 2.0);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random);
  return values;
}

double bound_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-15;
    case DType::kFloat32:
      return 3e-7;
    case DType::kBFloat16:
      return 4e-3;
    default:
      return 5e-4;
  }
}

struct Case {
  int64_t batch, heads, rows, dim, half;
  bool heads_inside, batched_tables;
  int positions;  // 0: offset, 1: starts, 2: a position for each row
};

}  // namespace

TEST(rotary_values) {
  const Case cases[] = {{1, 1, 1, 2, 1, false, false, 0},   {2, 3, 5, 8, 4, false, false, 1},
                        {2, 3, 67, 64, 32, true, false, 2}, {1, 2, 3, 75, 37, false, true, 0},
                        {3, 2, 4, 21, 9, true, true, 1},    {2, 1, 2, 7, 0, false, false, 2},
                        {2, 2, 9, 66, 17, false, true, 2},  {4, 8, 1, 130, 65, true, false, 1},
                        {0, 2, 3, 4, 2, false, false, 0},   {2, 2, 0, 4, 2, false, false, 1}};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Case& c : cases) {
      for (DType dtype : kDTypes) {
        for (int mode = 0; mode < 4; ++mode) {
          const bool interleaved = mode & 1, inverse = mode & 2;
          const int64_t count = c.batch * c.heads * c.rows * c.dim, positions = c.rows + 4,
                        offset = c.positions ? 0 : 3;
          const DType table = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
          const int64_t entries = (c.batched_tables ? c.batch : 1) * positions * c.half;
          Array x(dtype, drawn(count, 1)), out(dtype, count), again = out;
          Array cos(table, drawn(entries, 2)), sin(table, drawn(entries, 3));
          std::vector<int64_t> index;
          for (int64_t i = 0; i < c.batch * (c.positions == 2 ? c.rows : 1); ++i) index.push_back((5 * i + 2) % 4);
          const int64_t row = c.heads_inside ? c.heads * c.dim : c.dim, head = c.heads_inside ? c.dim : c.rows * c.dim;
          const int64_t batch = c.heads * c.rows * c.dim, of_batch = c.batched_tables ? positions * c.half : 0;
          Rotary args = {};
          args.dtype = dtype;
          args.x = x.data();
          args.out = out.data();
          args.cos = cos.data();
          args.sin = sin.data();
          args.index = c.positions ? index.data() : nullptr;
          args.batch = c.batch, args.heads = c.heads, args.rows = c.rows, args.dim = c.dim, args.half = c.half;
          args.positions = positions;
          args.x_batch = args.out_batch = batch, args.x_head = args.out_head = head, args.x_row = args.out_row = row;
          args.cos_batch = args.sin_batch = of_batch, args.cos_row = args.sin_row = c.half;
          args.index_batch = c.positions == 2 ? c.rows : 1, args.index_row = 1;
          args.offset = offset;
          args.starts = c.positions == 1, args.interleaved = interleaved, args.inverse = inverse;
          CHECK(genfast::cpu::rotary(args, 1));
          args.out = again.data();
          CHECK(genfast::cpu::rotary(args, 4));
          for (int64_t b = 0; b < c.batch; ++b) {
            for (int64_t h = 0; h < c.heads; ++h) {
              for (int64_t r = 0; r < c.rows; ++r) {
                const int64_t start = b * batch + h * head + r * row;
                const size_t at = static_cast<size_t>(c.positions == 2 ? b * c.rows + r : b);
                const int64_t position = c.positions == 0 ? offset + r : c.positions == 1 ? index[at] + r : index[at];
                for (int64_t i = 0; i < c.dim; ++i) {
                  double want = x.get(start + i), scale = std::fabs(want);
                  if (i < 2 * c.half) {
                    const int64_t pair = interleaved ? i / 2 : i % c.half;
                    const bool second = interleaved ? i % 2 : i >= c.half;
                    const double a = x.get(start + (interleaved ? 2 * pair : pair));
                    const double b_value = x.get(start + (interleaved ? 2 * pair + 1 : pair + c.half));
                    const int64_t entry = b * of_batch + position * c.half + pair;
                    const double co = cos.get(entry), si = inverse ? -sin.get(entry) : sin.get(entry);
                    want = second ? b_value * co + a * si : a * co - b_value * si;
                    scale = std::fabs(a * co) + std::fabs(b_value * si) + std::fabs(b_value * co) + std::fabs(a * si);
                  }
                  const double got = out.get(start + i);
                  CHECK(std::fabs(got - want) <= bound_of(dtype) * scale + 1e-7 * (dtype == DType::kFloat16),
                        "%s dtype %d mode %d dim %d half %d element %d: %.9g, not %.9g", isa, static_cast<int>(dtype),
                        mode, static_cast<int>(c.dim), static_cast<int>(c.half), static_cast<int>(i), got, want);
                  CHECK(check::same(got, again.get(start + i)), "%s: threads matter", isa);
                }
              }
            }
          }
          CHECK(out.guards_hold() && again.guards_hold(), "%s dtype %d mode %d dim %d: wrote outside", isa,
                static_cast<int>(dtype), mode, static_cast<int>(c.dim));
        }
      }
    }
  });
}

TEST(rotary_positions_outside_write_nothing) {
  Array x(DType::kFloat32, drawn(24, 1)), out(DType::kFloat32, 24);
  Array cos(DType::kFloat32, drawn(10, 2)), sin(DType::kFloat32, drawn(10, 3));
  const int64_t largest = INT64_MAX, smallest = INT64_MIN;
  struct Try {
    int64_t first, second, offset;
    bool starts, fits;
  };
  const Try tries[] = {{0, 2, 0, true, true},         {0, 3, 0, true, false},        {-1, 0, 0, true, false},
                       {0, largest, 0, true, false},  {smallest, 0, 0, true, false}, {0, 1, 2, true, false},
                       {0, 1, 1, true, true},         {4, 0, 0, false, true},        {5, 0, 0, false, false},
                       {0, largest, 0, false, false}, {0, 0, largest, false, false}, {0, 0, -1, false, false}};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Try& t : tries) {
      int64_t index[] = {t.first, t.second, 1};
      Array fresh = out;
      Rotary args = {};
      args.dtype = DType::kFloat32;
      args.x = x.data(), args.out = fresh.data(), args.cos = cos.data(), args.sin = sin.data(), args.index = index;
      args.batch = t.starts ? 2 : 1, args.heads = t.starts ? 1 : 2, args.rows = 3, args.dim = 4, args.half = 2;
      args.positions = 5;
      args.x_batch = args.out_batch = args.x_head = args.out_head = 12, args.x_row = args.out_row = 4;
      args.cos_row = args.sin_row = 2;
      args.index_batch = args.index_row = 1;
      args.offset = t.offset, args.starts = t.starts;
      CHECK(genfast::cpu::rotary(args, 2) == t.fits, "%s: %lld", isa, static_cast<long long>(t.second));
      if (!t.fits) CHECK(std::isnan(fresh.get(0)) && std::isnan(fresh.get(23)), "%s: written", isa);
    }
  });
}
