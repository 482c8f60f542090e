// The selective scan: what its forward and backward kernels share.
//
// b batch  l length  d channels  n state size  g groups. Compiled with, as macros: N (n, rounded up to a multiple of 8),
// X_KIND, DT_KIND, BC_KIND, Z_KIND, HAS_Z, HAS_D, HAS_BIAS, SOFTPLUS, PACKED, WHOLE (x, dt, z, dy, B and C can be read
// four neighbours at a time).
#pragma once
#include "numbers.cuh"
#include "packing.cuh"

constexpr int KEEP_EVERY = 32;  // positions from one kept state to the next
// States are kept for the backward pass in the signals' dtype where that has their exponents: rounded like the gradients
// that they go into.
constexpr int KEPT_KIND = X_KIND == BFLOAT16 ? BFLOAT16 : FLOAT32;
constexpr int TILES = (N + 15) / 16;  // the backward pass takes states 16 at a time

struct Strides { i64 b, l, d; };  // d: of channels, or of groups for B and C, whose states lie side by side

struct Params {
  const void *x, *dt, *B, *C, *z;
  const float *A, *D, *bias, *initial;
  const int* offsets;  // of packed sequences
  void *kept;          // see `kept_at`
  void* y;
  float *final_state;  // (sequences or b, d, n)
  // backward only
  const void* dy;
  const float* d_final;
  void *dx, *ddt;
  float *dA;
  void *dB, *dC;
  float *dD;
  void *dz;
  float *d_dt_bias, *d_initial;
  // scratch
  float *carry;     // (b, segments, d, N): the state, or its gradient, that comes into a segment
  float *span;      // (b, segments, d): the sum of a segment's steps; -1 where nothing passes through it
  float *d_bc;      // (blocks of channels, b, l, 2, N): of B and C, before the sum over channels
  float *d_rates;   // (b, segments, d, N): of A
  float *d_skip;    // (b, segments, d): of D
  float *d_bias;    // (b, segments, d)
  Strides sx, sdt, sz, sdy, sB, sC, sdz;
  i64 batch, length, channels, states, groups, sequences, segment, segments;
  i64 blocks;  // of channels, in a group
};

// Where states n ... n + 3 of a channel are kept, in fours: (b, l / KEEP_EVERY, d / 16, TILES, 2, 4, 8) for every other
// one of 16 channels, quarters of 16 states and pairs of channels, as the threads of a warp have them in the backward pass.
__device__ __forceinline__ i64 kept_at(i64 channels, i64 row, i64 channel, int n) {
  const i64 tile = (row * ((channels + 15) / 16) + channel / 16) * TILES + n / 16;
  return (tile * 2 + channel % 2) * 32 + n % 16 / 4 * 8 + channel % 16 / 2;
}

__device__ __forceinline__ i64 least(i64 a, i64 b) { return a < b ? a : b; }

__device__ __forceinline__ float step_of(float dt, float bias) {
  if (HAS_BIAS) dt += bias;
  return SOFTPLUS ? softplus<DT_KIND != FLOAT32>(dt) : dt;
}
