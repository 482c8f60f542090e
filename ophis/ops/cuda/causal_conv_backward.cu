// The short convolution, backward: x and dy come from memory once, but for W - 1 positions between chunks.
//
// A warp takes 128 channels, four a thread, through a chunk of `run` positions of one sequence. AHEAD positions are on
// their way while one is worked on. As position s comes in, its output is computed again for the slope of its activation, and
// position s - (W - 1) has met all the slopes that it enters: its gradient leaves, and what it adds to the weights'.
// `add_up` adds those over the chunks, in a fixed order.
//
// b batch  l length  d channels. Compiled with, as macros, besides those of causal_conv.cuh: HAS_D_FINAL, AHEAD, WARPS,
// BLOCKS.
#include "causal_conv.cuh"

static_assert(AHEAD % W == 0, "places of positions repeat");

struct Place { int row, sequence, start, end, first; };

__device__ __forceinline__ Place place_of(const Params& p, int chunk) {
  const int run = (int)p.run;
  if (!PACKED) {
    const int row = chunk / (int)p.runs;
    return {row, row, 0, (int)p.length, (chunk - row * (int)p.runs) * run};
  }
  const int sequence = sequence_of(p, chunk, run), start = p.offsets[sequence];
  return {0, sequence, start, p.offsets[sequence + 1], start_of(chunk, sequence, start, run)};
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) convolve_back(const __grid_constant__ Params p) {
  const int across = ((int)p.channels / 4 + 31) / 32;
  const int warp = blockIdx.x * WARPS + threadIdx.x / 32;  // those of neighbouring channels are neighbours
  const int chunk = warp / across, channel = (warp % across * 32 + threadIdx.x % 32) * 4;
  if (chunk >= p.chunks || channel >= p.channels) return;
  const Place at = place_of(p, chunk);
  const int first = at.first, end = at.end, last = first + (int)p.run < end ? first + (int)p.run : end;

  float sums[W + 1][4] = {};  // of the weights' gradients, and of the bias's
  auto leave_sums = [&] {
#pragma unroll
    for (int k = 0; k <= W; ++k)
      put4<FLOAT32>(p.partial, ((i64)chunk * (W + 1) + k) * p.channels + channel, sums[k], true, 4);
  };
  if (first >= end && first > at.start) {
    leave_sums();
    return;
  }

  float weights[4][W], bias[4];
  read_parameters(p, channel, weights, bias);
  const X* x = (const X*)p.x + at.row * p.x_b + channel;
  const X* dy = (const X*)p.dy + at.row * p.dy_b + channel;
  const X *next_x = x + first * p.x_l, *next_dy = dy + first * p.dy_l;
  int next = first;
  auto ask = [&](Four<X_KIND>& of_x, Four<X_KIND>& of_dy) {  // for the next position's
    of_x = {}, of_dy = {};
    if (next < end) of_x = fetch4<X_KIND>(next_x), of_dy = fetch4<X_KIND>(next_dy);
    next_x += p.x_l, next_dy += p.dy_l, ++next;
  };
  Four<X_KIND> before[W - 1], early_x[W - 1], early_dy[W - 1], xs[AHEAD], dys[AHEAD];
  const bool within = first - (W - 1) >= at.start;
#pragma unroll
  for (int j = 0; j < W - 1; ++j) before[j] = within ? fetch4<X_KIND>(next_x + (j - (W - 1)) * p.x_l) : Four<X_KIND>{};
#pragma unroll
  for (int j = 0; j < W - 1; ++j) ask(early_x[j], early_dy[j]);
#pragma unroll
  for (int u = 0; u < AHEAD; ++u) ask(xs[u], dys[u]);

  // Of the last W positions that came in, position s in place (s - first) % W. A slope is the gradient of what the
  // activation is applied to; before the chunk they are zeros here, since those inputs are not its own.
  float inputs[W][4], slopes[W][4] = {};
#pragma unroll
  for (int j = 1; j < W; ++j) {
    if (within) widen4<X_KIND>(before[j - 1], inputs[j]);
    else input_at(p, x, first - W + j, at.start, at.sequence, channel, inputs[j]);
  }
  auto enter = [&](const Four<X_KIND>& of_x, const Four<X_KIND>& of_dy, int place) {
    widen4<X_KIND>(of_x, inputs[place]);
    widen4<X_KIND>(of_dy, slopes[place]);
    if (!SILU) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float v = bias[j];
#pragma unroll
      for (int k = 0; k < W; ++k) v = fmaf(weights[j][k], inputs[(place + 1 + k) % W][j], v);
      const float s = sigmoid(v);
      slopes[place][j] *= s * fmaf(v, 1.f - s, 1.f);
    }
  };
  // The gradient of the oldest input, and what it adds to the sums.
  auto leave = [&](int oldest, float (&gradient)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      gradient[j] = 0.f;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float slope = slopes[(oldest + W - 1 - k) % W][j];
        gradient[j] = fmaf(weights[j][k], slope, gradient[j]);
        sums[k][j] = fmaf(inputs[oldest][j], slope, sums[k][j]);
      }
    }
  };
  // What the final window hands back to the input that is its place `kept`.
  auto add_d_final = [&](int kept, float (&gradient)[4]) {
    if (!HAS_D_FINAL || kept < 0 || kept >= W - 1) return;
    const float* from = p.d_final + at.sequence * p.final_b + kept * p.final_l + channel * p.final_d;
#pragma unroll
    for (int j = 0; j < 4; ++j) gradient[j] += from[j * p.final_d];
  };

  // With the first W - 1 positions leave inputs of the chunk before, or of the initial window.
#pragma unroll
  for (int j = 0; j < W - 1; ++j) {
    enter(early_x[j], early_dy[j], j);
    if (!HAS_INITIAL || first > at.start) continue;
    float gradient[4];
    leave((j + 1) % W, gradient);
    add_d_final(j - (end - at.start), gradient);  // a short sequence keeps some of it
    const i64 to = ((i64)at.sequence * (W - 1) + j) * p.channels + channel;
    put4<INITIAL_KIND>(p.d_initial, to, gradient, true, 4);
  }
  X* dx = (X*)p.dx + at.row * p.dx_b + first * p.dx_l + channel;
  for (int t = first; t < last; t += AHEAD) {
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      enter(xs[u], dys[u], (u + W - 1) % W);
      ask(xs[u], dys[u]);
      float gradient[4];
      leave(u % W, gradient);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[W][j] += slopes[u % W][j];
      add_d_final(t + u - (end - (W - 1)), gradient);
      put4<X_KIND>(dx, 0, gradient, true, t + u < last ? 4 : 0);
      dx += p.dx_l;
    }
  }
  leave_sums();
}

// A warp adds up 16 numbers of a chunk's, four a thread, over the chunks, eight of which it reads at once.
extern "C" __global__ void add_up(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % 32, numbers = (W + 1) * (int)p.channels;
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) / 32 * 16 + lane % 4 * 4;
  float sum[4] = {};
  if (i < numbers) {
#pragma unroll 8
    for (i64 chunk = lane / 4; chunk < p.chunks; chunk += 8) {
      float f[4];
      widen4<FLOAT32>(fetch4<FLOAT32>(p.partial + chunk * numbers + i), f);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += f[j];
    }
  }
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += __shfl_xor_sync(~0u, sum[j], lanes);
  }
  if (lane >= 4 || i >= numbers) return;
  const int k = i / (int)p.channels, channel = i % (int)p.channels;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (k < W) put<WEIGHT_KIND>(p.d_weight, (i64)(channel + j) * W + k, sum[j]);
    else if (HAS_BIAS) put<BIAS_KIND>(p.d_bias, channel + j, sum[j]);
  }
}
