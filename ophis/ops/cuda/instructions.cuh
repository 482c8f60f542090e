// Single machine instructions that C++ has no name for. Nothing here needs a header of the CUDA toolkit.
#pragma once

__device__ __forceinline__ float from_half(unsigned short v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}

__device__ __forceinline__ unsigned short to_half(float f) {
  unsigned short v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}

__device__ __forceinline__ unsigned short to_bfloat(float f) {
  unsigned short v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}

__device__ __forceinline__ unsigned to_halves(float low, float high) {
  unsigned v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

__device__ __forceinline__ unsigned to_bfloats(float low, float high) {
  unsigned v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

__device__ __forceinline__ float exp2_fast(float x) {  // 2 units in the last place
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What all threads of a warp have: the compiler may keep it once for all of them.
__device__ __forceinline__ int of_warp(int v) { return __shfl_sync(~0u, v, 0); }

// The same number, in a register of its own. What follows from a thread's index the compiler would find anew wherever it is
// needed, to have the register for something else: a tenth of a kernel's instructions, where registers are short.
__device__ __forceinline__ int settled(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// SIZE bytes, 4, 8 or 16, into shared memory, or zeros; it goes its own way until `await_copies`.
template <int SIZE> __device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from),
               "n"(SIZE), "r"(there ? SIZE : 0)
               : "memory");
}

// Between two groups of threads, `threads` in all: one that has something ready goes on, one that needs it waits.
__device__ __forceinline__ void pass_barrier(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void await_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A signal in shared memory that one thread gives and others wait for, again and again: its turns are 0, 1, 0, 1 ...
__device__ __forceinline__ void create_signal(unsigned long long* s) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"((unsigned)__cvta_generic_to_shared(s)) : "memory");
}

__device__ __forceinline__ void signal(unsigned long long* s) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"((unsigned)__cvta_generic_to_shared(s)) : "memory");
}

__device__ __forceinline__ void await_signal(unsigned long long* s, int turn) {
  asm volatile(
      "{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again; }" ::"r"(
          (unsigned)__cvta_generic_to_shared(s)),
      "r"(turn)
      : "memory");
}

__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Or in groups, of which all but the last PENDING are awaited.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void await_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// sums += a b, of a warp's 16 x 8 matrix a and 8 x 8 matrix b in tf32. With i = thread / 4 and k = thread % 4, a thread
// has a at (i, k), (i + 8, k), (i, k + 4), (i + 8, k + 4), b at (k, i), (k + 4, i), and of the sums (i, 2k), (i, 2k + 1),
// (i + 8, 2k), (i + 8, 2k + 1).
__device__ __forceinline__ void multiply_tf32(float (&sums)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
