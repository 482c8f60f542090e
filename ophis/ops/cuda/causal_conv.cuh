// What both passes of the short convolution share.
//
// b batch  l length  d channels. Compiled with, as macros: X_KIND, WEIGHT_KIND, BIAS_KIND, INITIAL_KIND, W, SILU,
// HAS_BIAS, HAS_INITIAL, PACKED.
#pragma once
#include "numbers.cuh"
#include "packing.cuh"

using X = Stored<X_KIND>::type;

struct Params {
  const void *x, *weight, *bias, *initial;  // (d, W); (d)
  const int* offsets;                       // of packed sequences
  void* y;
  float* final_state;  // (b or sequences, W - 1, d)
  // The rest is the backward pass's.
  const void* dy;
  const float* d_final;
  void *dx, *d_weight, *d_bias, *d_initial;
  float* partial;  // (chunks, W + 1, d): of d_weight, and of d_bias
  i64 x_b, x_l, initial_b, initial_l, initial_d, dy_b, dy_l, final_b, final_l, final_d, dx_b, dx_l;
  i64 batch, length, channels, sequences, runs, run, chunks;
};

// The four channels' inputs at a position of a sequence that starts at `start`, or before it.
__device__ __forceinline__ void input_at(const Params& p, const X* x, int position, int start, int sequence, int channel, float (&f)[4]) {
  if (position >= start) {
    widen4<X_KIND>(fetch4<X_KIND>(x + position * p.x_l), f);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    f[k] = 0.f;
    if (HAS_INITIAL) {
      const i64 at = sequence * p.initial_b + (position - start + W - 1) * p.initial_l + (channel + k) * p.initial_d;
      f[k] = widen<INITIAL_KIND>(((const Stored<INITIAL_KIND>::type*)p.initial)[at]);
    }
  }
}

// The parameters of four channels.
__device__ __forceinline__ void read_parameters(const Params& p, int channel, float (&weights)[4][W], float (&bias)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto* w = (const Stored<WEIGHT_KIND>::type*)p.weight + (i64)(channel + j) * W;
    float f[4];
    if (W == 4) widen4<WEIGHT_KIND>(fetch4<WEIGHT_KIND>(w), f);
    else widen4<WEIGHT_KIND>(fetch4<WEIGHT_KIND>(w, 1, W), f);
#pragma unroll
    for (int k = 0; k < W; ++k) weights[j][k] = f[k];
    bias[j] = 0.f;
  }
  if (HAS_BIAS) widen4<BIAS_KIND>(fetch4<BIAS_KIND>((const Stored<BIAS_KIND>::type*)p.bias + channel), bias);
}
