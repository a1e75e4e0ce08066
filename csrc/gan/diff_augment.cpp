// Draws the parameters of each image and hands images to threads.
#include "gan/diff_augment.h"

#include "common/parallel.h"
#include "common/philox.h"
#include "gan/diff_augment_cpu.h"

namespace genfast {
namespace cpu {
namespace {

// floor(u n), u in [0, 1) a multiple of 2^-24.
int64_t index_below(float u, int64_t n) {
  return static_cast<int64_t>(static_cast<double>(u) * static_cast<double>(n));
}

int64_t shift_of(float u, int64_t size) {
  const int64_t most = (size + 4) / 8;  // size / 8, rounded
  return index_below(u, 2 * most + 1) - most;
}

void rectangle(float u, int64_t size, int64_t* first, int64_t* end) {
  const int64_t side = (size + 1) / 2, start = index_below(u, size + 1 - side % 2) - side / 2;
  *first = start > 0 ? start : 0;
  *end = start + side < size ? start + side : size;
}

}  // namespace

void diff_augment(const DiffAugment& args, int threads) {
  const int64_t elements = args.channels * args.height * args.width;
  if (args.batch * elements == 0) return;
  auto* const augment = GENFAST_FOR_ISA(augment_image);
  auto* const sum = GENFAST_FOR_ISA(shown_sum);
  parallel_for(args.batch, args.batch * elements < 16384 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float u[8];
      for (uint64_t half = 0; half < 2; ++half) {
        const uint64_t group = 2 * static_cast<uint64_t>(args.offset + i) + half;
        const philox::Words words = philox::tensor_words(group, 0, philox::kTensorUniform, args.seed);
        for (uint64_t w = 0; w < 4; ++w) u[4 * half + w] = philox::uniform(words.w[w]);
      }
      AugmentedImage image = {};
      image.dtype = args.dtype;
      const int64_t skipped = i * elements * bytes_of(args.dtype);
      image.x = static_cast<const char*>(args.x) + skipped;
      image.out = static_cast<char*>(args.out) + skipped;
      image.channels = args.channels, image.height = args.height, image.width = args.width;
      const bool transposed = args.mode == 2;
      if ((args.policy & kAugmentTranslation) != 0) {
        image.row_shift = -shift_of(u[3], args.height);
        image.column_shift = -shift_of(u[4], args.width);
      }
      if ((args.policy & kAugmentCutout) != 0) {
        rectangle(u[5], args.height, &image.cut_row, &image.cut_row_end);
        rectangle(u[6], args.width, &image.cut_column, &image.cut_column_end);
      }
      double contrast = 1.0, saturation = 1.0;
      if ((args.policy & kAugmentColor) != 0) {
        if (args.mode == 0) image.base = static_cast<double>(u[0]) - 0.5;
        saturation = 2.0 * static_cast<double>(u[1]);
        contrast = static_cast<double>(u[2]) + 0.5;
      }
      image.own = contrast * saturation;
      image.shared = contrast * (1.0 - saturation);
      if (transposed) {  // the rectangle is one of x then: in the coordinates of out
        image.row_shift = -image.row_shift, image.column_shift = -image.column_shift;
        image.cut_row -= image.row_shift, image.cut_row_end -= image.row_shift;
        image.cut_column -= image.column_shift, image.cut_column_end -= image.column_shift;
        if (image.cut_column < 0) image.cut_column = 0;
        if (image.cut_column_end > args.width) image.cut_column_end = args.width;
      }
      if (contrast != 1.0) {
        AugmentedImage whole = image;
        if (!transposed) {
          whole.row_shift = whole.column_shift = 0;
          whole.cut_row_end = whole.cut_row;
        }
        image.base += (1.0 - contrast) * sum(whole) / static_cast<double>(elements);
      }
      image.outside = transposed ? image.base : 0.0;
      augment(image);
    }
  });
}

}  // namespace cpu
}  // namespace genfast
