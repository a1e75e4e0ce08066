// Loads and stores of a thread's neighbouring elements, converted to and from float32: 16-byte accesses (8-byte
// for four halves) where rows are aligned, else one access an element under a mask.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace genfast {
namespace cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
// A sample: 0, 1 or NaN, which uint8 writes as 255.
template <>
__device__ __forceinline__ uint8_t from_float<uint8_t>(float x) {
  return isnan(x) ? uint8_t{255} : static_cast<uint8_t>(x != 0.0f);
}

// kLane, the kernels' template parameter, is the number of elements that a lane handles at once: 8 or 4 where rows are
// multiples of it and aligned, or 0 for four under a mask.
__host__ __device__ constexpr int width_of(int lane) { return lane == 0 ? 4 : lane; }

inline int lane_for(int64_t columns, int64_t offset, bool aligned) {
  if (!aligned || offset % 4 != 0 || columns % 4 != 0) return 0;
  return columns % 8 == 0 ? 8 : 4;
}

template <int kBytes>
struct Packed;
template <>
struct Packed<4> {
  using type = uint32_t;
};
template <>
struct Packed<8> {
  using type = uint2;
};
template <>
struct Packed<16> {
  using type = uint4;
};

// In assembly for 16 bytes, because the compiler may split a plain store into four.
template <typename Word>
__device__ __forceinline__ void store_word(void* p, Word word) {
  if constexpr (sizeof(Word) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p)), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w));
  } else {
    *static_cast<Word*>(p) = word;
  }
}

// x[i] = p[column + i] for the i with 0 <= column + i < columns, else 0. Aligned rows are never cut.
template <bool kAligned, int N, typename T>
__device__ __forceinline__ void load(const T* p, int64_t column, int64_t columns, float (&x)[N]) {
  if constexpr (kAligned) {
    constexpr int kPart = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
    using Word = typename Packed<kPart * sizeof(T)>::type;
#pragma unroll
    for (int i = 0; i < N; i += kPart) {
      const Word word = __ldg(reinterpret_cast<const Word*>(p + column + i));
      T values[kPart];
      memcpy(values, &word, sizeof(word));
#pragma unroll
      for (int j = 0; j < kPart; ++j) x[i + j] = to_float(values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = static_cast<uint64_t>(column + i) < static_cast<uint64_t>(columns) ? to_float(p[column + i]) : 0.0f;
    }
  }
}

template <bool kAligned, int N, typename T>
__device__ __forceinline__ void store(T* p, int64_t column, int64_t columns, const float (&x)[N]) {
  if constexpr (kAligned) {
    constexpr int kPart = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
    using Word = typename Packed<kPart * sizeof(T)>::type;
#pragma unroll
    for (int i = 0; i < N; i += kPart) {
      T values[kPart];
#pragma unroll
      for (int j = 0; j < kPart; ++j) values[j] = from_float<T>(x[i + j]);
      Word word;
      memcpy(&word, values, sizeof(word));
      store_word(p + column + i, word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (static_cast<uint64_t>(column + i) < static_cast<uint64_t>(columns)) p[column + i] = from_float<T>(x[i]);
    }
  }
}

}  // namespace cuda
}  // namespace genfast
