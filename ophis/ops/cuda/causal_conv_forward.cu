// The short convolution, forward: every number comes from memory once, in vectors of four channels.
//
// A thread takes four neighbouring channels through RUN positions, all of whose inputs it asks for before it needs the
// first. The W - 1 before them come from the cache, into which its neighbour in time has fetched them. The last blocks
// leave the final windows.
//
// b batch  l length  d channels. Compiled with, as macros, besides those of causal_conv.cuh: RUN, WARPS.
#include "causal_conv.cuh"

__device__ __forceinline__ void leave_windows(const Params& p, i64 index) {
  const i64 fours = p.channels / 4;
  if (index >= p.sequences * fours) return;
  const int sequence = (int)(index / fours), channel = (int)(index % fours) * 4;
  const int start = PACKED ? p.offsets[sequence] : 0, end = PACKED ? p.offsets[sequence + 1] : (int)p.length;
  const X* x = (const X*)p.x + (PACKED ? 0 : sequence) * p.x_b + channel;
#pragma unroll
  for (int j = 0; j < W - 1; ++j) {
    float f[4];
    input_at(p, x, end - (W - 1) + j, start, sequence, channel, f);
    put4<FLOAT32>(p.final_state, ((i64)sequence * (W - 1) + j) * p.channels + channel, f, true, 4);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) convolve(const __grid_constant__ Params p) {
  // In 32 bits, since a division of 64 takes a hundred instructions.
  const int across = ((int)p.channels / 4 + 31) / 32, runs = (int)p.runs, blocks = across * runs * (int)p.batch;
  int index = blockIdx.x;
  if (index >= blocks) {
    leave_windows(p, (i64)(index - blocks) * (32 * WARPS) + threadIdx.x);
    return;
  }
  const int channel = (index % across * 32 + threadIdx.x % 32) * 4; index /= across;
  const i64 b = index / runs;
  const int first = (index % runs * WARPS + threadIdx.x / 32) * RUN;
  const int last = first + RUN < p.length ? first + RUN : (int)p.length;
  if (channel >= p.channels || first >= p.length) return;

  const X* x = (const X*)p.x + b * p.x_b + channel;
  const X* from = x + first * p.x_l;
  const int step = (int)p.x_l, y_step = (int)p.channels;
  Four<X_KIND> rows[W - 1 + RUN];
  if (first >= W - 1 && first + RUN <= p.length) {
#pragma unroll
    for (int i = 0; i < W - 1 + RUN; ++i) rows[i] = fetch4<X_KIND>(from + (i - (W - 1)) * step);
  } else {
#pragma unroll
    for (int i = 0; i < W - 1 + RUN; ++i) {
      rows[i] = {};
      if (first + i >= W - 1 && first + i - (W - 1) < p.length) rows[i] = fetch4<X_KIND>(from + (i - (W - 1)) * step);
    }
  }
  float weights[4][W], bias[4];
  read_parameters(p, channel, weights, bias);

  X* y = (X*)p.y + (b * p.length + first) * p.channels + channel;
  auto leave = [&](int t, const float (&window)[W][4], int oldest) {
    float f[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float v = bias[j];
#pragma unroll
      for (int k = 0; k < W; ++k) v = fmaf(weights[j][k], window[(oldest + k) % W][j], v);
      f[j] = SILU ? v * sigmoid(v) : v;
    }
    put4<X_KIND>(y, t * y_step, f, true, first + t < last ? 4 : 0);
  };
  float window[W][4];

  // Where a sequence starts within a window, each position looks up which one it is in.
  int sequence = PACKED ? sequence_at(p, first) : (int)b, start = PACKED ? p.offsets[sequence] : 0;
  const bool starts = PACKED ? start > first - (W - 1) || p.offsets[sequence + 1] < last : HAS_INITIAL && first < W - 1;
  if (starts) {
    for (int t = first; t < last; ++t) {
      if (PACKED && t >= p.offsets[sequence + 1]) sequence = sequence_at(p, t), start = p.offsets[sequence];
#pragma unroll
      for (int k = 0; k < W; ++k) input_at(p, x, t - (W - 1) + k, start, sequence, channel, window[k]);
      leave(t - first, window, 0);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < W - 1; ++i) widen4<X_KIND>(rows[i], window[i]);
#pragma unroll
  for (int t = 0; t < RUN; ++t) {
    widen4<X_KIND>(rows[W - 1 + t], window[(W - 1 + t) % W]);
    leave(t, window, t % W);
  }
}
