// Attention on the CPU: what a call is made of. Formulas in docs/kernels/attention.md.
//
// All strides are in elements; the last dimension of q, k, v and their like is contiguous.
#pragma once

#include "common/dtype.h"

namespace genfast {

// [batch, heads, rows, columns], contiguous columns.
struct Rows {
  void* data;
  int64_t batch, head, row;  // strides
};

constexpr int64_t kFewQueries = 8;  // up to so many, keys are read once and packing them would not pay

struct Attention {
  DType dtype;  // of q, k, v, the bias, and everything of their shapes
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
  Rows q, k, v;
  Rows out;          // [batch, heads, queries, value_depth]
  const float* lse;  // [batch, heads, queries], contiguous, as all statistics of rows

  // Added to the scores: a bias [batch, heads, queries, keys], where a stride of 0 repeats, and an entry
  // q_index[i] - k_index[j] of table [batch, heads, length]; without indices it is entry i - j + keys - 1.
  const void* bias;
  int64_t bias_stride[4];
  const float* table;
  int64_t table_batch, table_head, table_length;
  const int32_t *q_index, *k_index;
  const uint8_t* mask;  // 0 hides
  int64_t mask_stride[4];
  const float* sinks;  // [heads]: one more column without value

  float scale, softcap;        // no cap: 0
  uint32_t dropout_threshold;  // of 16-bit lanes; 0: none
  float dropout_factor;
  uint64_t seed;
  int64_t left, right, shift;  // key j is visible to query i where -left <= j - (i + shift) <= right; -1: no bound
  int64_t batch_offset;        // of the batch's first element in the batch that dropout counts

  // Packed sequences, or null: sequence n has rows q_starts[n] ... q_starts[n + 1] of q and of what is of its shape,
  // and of k and v likewise. `batch` counts them, `queries` and `keys` are those of all together, indices are by row of
  // all; bias, mask and table are by sequence and position in it.
  const int64_t *q_starts, *k_starts;
  bool bottom_right;  // keys - queries of each sequence adds to its shift

  // Set by the functions below.
  DType out_dtype;                       // of out
  int64_t lse_batch, lse_head, lse_row;  // strides of lse and its like
  const int32_t* pages;  // key j is row j % page_size of element pages[j / page_size] of k's and v's batch; or null
  int64_t page_size;
  bool pairs;  // products in pairs of bfloat16 (common/gemm/product_bfloat16.h)
};

struct AttentionForward {
  Attention a;
  float* lse;  // written
};

// The tangents of the inputs, and what is theirs.
struct AttentionTangent {
  Attention a;
  Rows q, k, v;      // tangents
  const void* bias;  // [as a.bias] with strides of its own, or null
  int64_t bias_stride[4];
  const float *table, *sinks;  // as in a, or null
  Rows out;                    // written
  float* lse;                  // written
};

// Where the gradient of the bias goes.
enum class BiasGradient : int32_t {
  kNone = 0,
  kElements = 1,  // [batch, heads, queries, keys] in dtype: each element of its own
  kReduced = 2,   // [bias_batch, bias_heads, queries, keys] in dtype, summed over the batch, the heads or both
  kColumns = 3,   // [batch, heads, keys] float32, summed over queries
  kRows = 4,      // [splits, batch, heads, queries] float32, summed over the keys of a split
};

struct AttentionGradient {
  Attention a;
  Rows dout;          // cotangent of out
  const float* dlse;  // of lse, or null
  Rows dq, dk, dv;    // written
  BiasGradient bias_gradient;
  void* dbias;
  int64_t bias_batch, bias_heads;
  float* dtable;                         // [splits, batch, heads, table_length], written; or null
  float* dq_partial;                     // [splits, batch, heads, queries, depth] where splits > 1
  int64_t splits;                        // of the keys: attention_splits(), the most of any packed sequence
  int64_t partial_split, partial_batch;  // strides of dq_partial, set by attention_gradient()

  // Second order: the gradient of <dout, out'> + <dlse, lse'>. Null q for first order.
  bool second;
  AttentionTangent t;  // its out and lse are read
};

// Forward over the first lengths[b] keys of each element b of the batch, whose last query sees the last of them. k and
// v have room for a.keys.
struct AttentionDecode {
  Attention a;
  float* lse;              // written
  const int64_t* lengths;  // [batch]
  // The keys lie in pages of page_size rows, numbers blocks[b, :] of k's and v's batch; null: in element b itself.
  const int32_t* blocks;
  int64_t blocks_stride, page_size;
  int64_t splits;  // of the keys: attention_splits()
  float* partial;  // [splits, batch, heads, queries, value_depth + 1] where splits > 1: out and lse of each
};

// Rows [batch, heads, count, width] after the first lengths[b] ones of a cache laid out as AttentionDecode's.
struct AttentionAppend {
  DType dtype;
  Rows rows, cache;
  int64_t batch, heads, count, width;
  const int64_t* lengths;
  const int32_t* blocks;
  int64_t blocks_stride, page_size;
};

namespace cpu {
void attention_forward(const AttentionForward& args, int threads);
void attention_tangent(const AttentionTangent& args, int threads);
void attention_gradient(const AttentionGradient& args, int threads);
void attention_decode(const AttentionDecode& args, int threads);
void attention_append(const AttentionAppend& args);
// Parts that the gradient divides the keys into; it depends on the shapes alone, so that results do not depend on the
// number of threads.
int64_t attention_splits(int64_t batch, int64_t kv_heads, int64_t queries, int64_t keys);
}  // namespace cpu

}  // namespace genfast
