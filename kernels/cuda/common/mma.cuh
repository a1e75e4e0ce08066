// Asynchronous copies, matrix loads and bfloat16 matrix products in the forms that every GPU from sm_80 on has, and the
// placement of tiles in shared memory. Fragments of mma m16n8k16, g = lane / 4, t = lane % 4, two values a register:
//
//   A (16 x 16)   a0: row g, k 2t..   a1: row g + 8, k 2t..   a2: row g, k 2t + 8..   a3: row g + 8, k 2t + 8..
//   B (16 x 8)    b0: k 2t.., column g   b1: k 2t + 8.., column g
//   C (16 x 8)    c0, c1: row g, columns 2t, 2t + 1   c2, c3: row g + 8
#pragma once

#include <cstdint>

namespace genfast {
namespace cuda {
namespace mma {

// The address of 16-byte piece `piece` of row `row`: eight rows of a piece, or eight pieces of a row, lie in different
// banks. Rows that are a multiple of 8 apart have the same permutation.
template <int kRowBytes>
__host__ __device__ constexpr uint32_t place(int row, int piece) {
  static_assert(kRowBytes == 64 || kRowBytes == 128 || kRowBytes == 256);
  return row * kRowBytes + ((piece ^ (kRowBytes == 64 ? (row >> 1) & 3 : row & 7)) << 4);
}

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, those from `bytes` on being zero.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace mma
}  // namespace cuda
}  // namespace genfast
