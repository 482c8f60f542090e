// SSD: what its kernels share.
//
// b batch  l length  h heads  p head width  g groups of heads  n state width. A chunk has 64 positions, t or s; a tile,
// 64 of a head's p channels. Compiled with, as macros: N (n: 64, 128 or 256), PACKED, PARTS (p / 64).
#pragma once
#include "packing.cuh"
#include "warpgroup.cuh"

constexpr int CHUNK = 64, TILE = 64;
constexpr int GROUP = 128;  // threads of a warpgroup
constexpr float NOTHING = -1e30f;  // log2 of a decay that leaves nothing

struct Strides { i64 b, l, h; };  // h: of heads, or of groups for B and C; channels and states lie side by side

// Of a chunk and head, computed once: see `steps`.
struct Decays { float log[CHUNK], step[CHUNK], until[CHUNK], since[CHUNK]; };

constexpr int DECAYS_PIECES = sizeof(Decays) / 16;

__device__ __forceinline__ void copy_piece(Decays& to, const Decays& from, int piece) {
  copy_piece(reinterpret_cast<char*>(&to) + 16 * piece, reinterpret_cast<const char*>(&from) + 16 * piece, true);
}

struct Params {
  const bfloat16 *x, *B, *C;
  const void* dt;
  const float *A, *bias, *D, *initial;
  const int* offsets;        // of packed sequences
  bfloat16* y;
  float* final_state;
  // backward only
  const bfloat16* dy;
  const float* d_final;
  bfloat16* dx;
  void* d_dt;
  float* dA;                 // (h), as the next two
  float *d_bias, *dD;
  bfloat16 *dB, *dC;
  float* d_initial;
  // scratch
  Decays* decays;            // (chunks, h)
  float *passed;             // (b, segments, h, p, n): the state, or its gradient, that a segment is entered with
  float *totals;             // (b, segments, h): log2 of what a segment leaves of that
  bfloat16 *states, *flows;  // (chunks, h, p, n): the states before chunks, the gradients of those after them
  float *partial_B, *partial_C;  // (splits, b, l, g, n), where the heads of a group are shared out
  uint4 *between;            // (chunks, g, splits, 4, 128): dS, from the first slice of states to the others
  float *sums;               // (slices, chunks, h tiles, 4, 64)
  float *of_chunks;          // (slices, chunks, h tiles, 2)
  float *partial_A;          // (chunks, 2, h): of A and the bias
  Strides sx, sB, sC, sdy, sdt, sdx, sdB, sdC;
  i64 D_h, D_p;
  i64 batch, length, heads, width, groups, sequences, chunks, segment, segments, splits;  // chunks: of a row
  i64 taken;                 // segments that a block of `outputs` takes
  i64 ends;                  // segments of a row whose ends are wanted
  i64 slice, slices;         // of more than N states, backward: which N these are
  float low, high;           // limits of a step
};

template <class T> __device__ __forceinline__ T least(T a, T b) { return a < b ? a : b; }

// Where a chunk lies in its row.
struct Place {
  int begin, end, start;  // of the sequence; of the chunk

  __device__ __forceinline__ int count() const { return least(CHUNK, end - start); }  // may be negative
  __device__ __forceinline__ bool is_first() const { return start == begin; }
  __device__ __forceinline__ bool is_last() const { return start < end && start + CHUNK >= end; }
};

// The sequence of a chunk, from that of a neighbouring one.
__device__ __forceinline__ int follow(const Params& p, int chunk, int sequence) {
  while (p.offsets[sequence] / CHUNK + sequence > chunk) --sequence;
  while (p.offsets[sequence + 1] / CHUNK + sequence + 1 <= chunk) ++sequence;
  return sequence;
}

__device__ __forceinline__ Place place_of(const Params& p, int chunk, int sequence) {
  if (!PACKED) return {0, (int)p.length, chunk * CHUNK};
  const int begin = p.offsets[sequence];
  return {begin, p.offsets[sequence + 1], start_of(chunk, sequence, begin, CHUNK)};
}

// `count` rows into so many columns of a matrix, zeros into the rest, by THREADS threads of which this one is `thread`.
// Their addresses are found once: of each thread, every DOWN rows, eight numbers.
template <int THREADS, int COLUMNS> struct Rows {
  static constexpr int PIECES = COLUMNS / 8, DOWN = THREADS / PIECES;
  static_assert(DOWN % 8 == 0, "a thread's places in a matrix are then a constant apart");
  const bfloat16* from;
  i64 step;
  int row, place;

  __device__ __forceinline__ Rows(const bfloat16* first, i64 stride, int thread) : step(DOWN * stride) {
    row = thread / PIECES;
    from = first + row * stride + thread % PIECES * 8;
    place = Matrix<CHUNK, COLUMNS>::place(row, thread % PIECES * 8);
  }
  __device__ __forceinline__ void copy(bfloat16* to, i64 offset, int count) const {
    const bfloat16* at = from + offset;
#pragma unroll
    for (int i = 0; i < CHUNK / DOWN; ++i, at += step) copy_piece(to + place + i * DOWN * 64, at, row + i * DOWN < count);
  }
};

__device__ __forceinline__ float low_half(unsigned v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_half(unsigned v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ unsigned scaled(unsigned v, float low, float high) {
  return to_bfloats(low_half(v) * low, high_half(v) * high);
}

// Sixteen columns of sums, from 16 k on, as a factor's fragments.
template <int COUNT> __device__ __forceinline__ void as_fragments(unsigned (&a)[4], const float (&sums)[COUNT], int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = to_bfloats(sums[8 * k + 2 * i], sums[8 * k + 2 * i + 1]);
}
