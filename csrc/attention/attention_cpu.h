// The pieces of work that attention.cpp hands to threads.
#pragma once

#include "attention/attention.h"
#include "common/cpu_features.h"

namespace genfast {

// A run of (query head of the group, block of queries) pairs [first, last) of one head of keys and values.
struct AttentionUnit {
  int64_t batch, kv_head, first, last;
};

GENFAST_DECLARE_WITH_PRODUCT(int64_t, attention_query_blocks, (const Attention&))
GENFAST_DECLARE_WITH_PRODUCT(int64_t, attention_forward_floats, (const Attention&))
GENFAST_DECLARE_WITH_PRODUCT(void, attention_forward_unit, (const AttentionForward&, const AttentionUnit&, float* room))
GENFAST_DECLARE_WITH_PRODUCT(int64_t, attention_tangent_floats, (const Attention&))
GENFAST_DECLARE_WITH_PRODUCT(void, attention_tangent_unit, (const AttentionTangent&, const AttentionUnit&, float* room))
// out and lse of (batch, head) from those of the splits.
GENFAST_DECLARE_WITH_PRODUCT(void, attention_merge_splits, (const AttentionDecode&, int64_t batch, int64_t head))
// Gradients of the keys of one split of one head.
GENFAST_DECLARE_WITH_PRODUCT(int64_t, attention_gradient_floats, (const AttentionGradient&))
GENFAST_DECLARE_WITH_PRODUCT(void, attention_gradient_unit,
                             (const AttentionGradient&, int64_t batch, int64_t kv_head, int64_t split, float* room))
// dq of (batch, head) from the partial sums of the splits.
GENFAST_DECLARE_WITH_PRODUCT(void, attention_sum_splits, (const AttentionGradient&, int64_t batch, int64_t head))
// One tile of a reduced bias gradient; tiles are numbered over [bias_batch, bias_heads, query blocks, key blocks].
GENFAST_DECLARE_WITH_PRODUCT(int64_t, attention_bias_floats, (const AttentionGradient&))
GENFAST_DECLARE_WITH_PRODUCT(int64_t, attention_bias_tiles, (const AttentionGradient&))
GENFAST_DECLARE_WITH_PRODUCT(void, attention_bias_tile, (const AttentionGradient&, int64_t tile, float* room))

}  // namespace genfast
