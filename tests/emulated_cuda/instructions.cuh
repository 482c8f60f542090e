// A multiprocessor in C++: each thread of a block is a fiber, and a barrier is where it lets the others run. With the
// names of ophis/ops/cuda/instructions.cuh and those that CUDA itself gives, so that a kernel compiles unchanged.
#pragma once
#include <ucontext.h>

#include <math.h>
#include <algorithm>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>


#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned v) { float f; std::memcpy(&f, &v, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned v; std::memcpy(&v, &f, 4); return v; }

struct Index3 { int x = 0, y = 0, z = 0; };
inline Index3 threadIdx, blockIdx, blockDim;

constexpr int SHARED = 227 * 1024;
alignas(1024) char memory[SHARED];  // of the one block that runs

// Fibers

struct Meeting { int arrived = 0, round = 0, alive = 0; };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool done = false;
  float given[8];
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting block;
inline std::function<void()> body;

inline void give_way() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

inline void release(Meeting& meeting) {
  if (meeting.arrived && meeting.arrived >= meeting.alive) meeting.arrived = 0, ++meeting.round;
}

inline void meet(Meeting& meeting) {
  const int round = meeting.round;
  ++meeting.arrived;
  release(meeting);
  while (meeting.round == round) give_way();
}

inline void __syncthreads() { meet(block); }
inline void __syncwarp() { meet(warps[threadIdx.x / 32]); }

inline std::vector<Meeting> barriers;

inline void pass_barrier(int barrier, int threads) {
  Meeting& meeting = barriers[barrier];
  meeting.alive = threads, ++meeting.arrived;
  release(meeting);
}

inline void await_barrier(int barrier, int threads) {
  barriers[barrier].alive = threads;
  meet(barriers[barrier]);
}

inline void create_signal(unsigned long long* s) { *s = 0; }
inline void signal(unsigned long long* s) { ++*s; }
inline void await_signal(unsigned long long* s, int turn) {
  while (int(*s & 1) == turn) give_way();
}

inline int of_warp(int v) { return v; }
inline int settled(int v) { return v; }

inline void begin() {
  body();
  fibers[threadIdx.x].done = true;
  --block.alive, --warps[threadIdx.x / 32].alive;  // whoever waits does not wait for this one
  release(block), release(warps[threadIdx.x / 32]);
  give_way();
}

inline void run(long blocks, int threads, std::function<void()> kernel) {
  body = kernel;
  blockDim.x = threads;
  fibers.resize(threads);
  for (long i = 0; i < blocks; ++i) {
    std::memset(memory, 0xff, SHARED);  // NaN: what is read was written
    block = Meeting{0, 0, threads};
    barriers.assign(16, Meeting{});
    warps.assign((threads + 31) / 32, Meeting{0, 0, 32});
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, begin, 0);
    }
    for (bool busy = true; busy;) {
      busy = false;
      for (int t = 0; t < threads; ++t) {
        if (fibers[t].done) continue;
        busy = true;
        threadIdx.x = t, blockIdx.x = i;
        swapcontext(&scheduler, &fibers[t].context);
      }
    }
  }
}

// What a warp's threads give each other.

inline float given_by(int other, float v) {
  fibers[threadIdx.x].given[0] = v;
  __syncwarp();
  const float theirs = fibers[other].given[0];
  __syncwarp();
  return theirs;
}

inline float __shfl_xor_sync(unsigned, float v, int lanes) { return given_by(threadIdx.x ^ lanes, v); }
inline float __shfl_up_sync(unsigned, float v, int lanes) {
  const int thread = threadIdx.x;
  return given_by(thread % 32 < lanes ? thread : thread - lanes, v);
}

inline float as_tf32(float f) { return __uint_as_float(__float_as_uint(f) & 0xffffe000u); }

inline void multiply_tf32(float (&sums)[4], const float (&a)[4], float b0, float b1) {
  const int thread = threadIdx.x, first = thread / 32 * 32, i = thread % 32 / 4, k = thread % 4;
  float* given = fibers[thread].given;
  for (int j = 0; j < 4; ++j) given[j] = as_tf32(a[j]);
  given[4] = as_tf32(b0), given[5] = as_tf32(b1);
  __syncwarp();
  for (int j = 0; j < 4; ++j) {
    const int row = i + j / 2 * 8, column = 2 * k + j % 2;
    for (int q = 0; q < 8; ++q) {
      const float x = fibers[first + row % 8 * 4 + q % 4].given[row / 8 + q / 4 * 2];
      const float y = fibers[first + column * 4 + q % 4].given[4 + q / 4];
      sums[j] += x * y;
    }
  }
  __syncwarp();
}

// Numbers

inline float exp2_fast(float x) { return ::exp2f(x); }
inline float log2_fast(float x) { return ::log2f(x); }
inline float reciprocal(float x) { return 1.f / x; }

inline unsigned short to_bfloat(float f) {
  const unsigned v = __float_as_uint(f);
  return f != f ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
inline float from_half(unsigned short v) { _Float16 h; std::memcpy(&h, &v, 2); return h; }
inline unsigned short to_half(float f) { const _Float16 h = f; unsigned short v; std::memcpy(&v, &h, 2); return v; }
inline unsigned to_halves(float low, float high) { return to_half(low) | (unsigned)to_half(high) << 16; }
inline unsigned to_bfloats(float low, float high) { return to_bfloat(low) | (unsigned)to_bfloat(high) << 16; }

template <int SIZE> inline void copy_async(void* to, const void* from, bool there) {
  if ((uintptr_t)to % SIZE || (uintptr_t)from % SIZE) std::abort();
  if (there) std::memcpy(to, from, SIZE);
  else std::memset(to, 0, SIZE);
}
inline void await_copies() {}
inline void commit_copies() {}
template <int PENDING> void await_copies_but() {}
