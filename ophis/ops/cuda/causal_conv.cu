// The short convolution, forward: every number read once from memory, eight or four at a time.
//
// A thread takes EACH neighbouring channels, 16 bytes, through RUN positions, all of whose inputs it asks for before it
// needs the first; the W - 1 before them come from the cache, into which the warp beside it has fetched them.
// Compiled with, as macros: X_KIND, W_KIND, W, SILU, HAS_BIAS, RUN, WARPS.
#include "numbers.cuh"

typedef long long i64;
using X = Stored<X_KIND>::type;
using Weight = Stored<W_KIND>::type;
constexpr int EACH = 4 * FOURS;

struct Params {
  const void *x, *weight, *bias;
  void* y;
  float* final_state;  // (b, W - 1, d)
  i64 x_b, x_l, batch, length, channels;
};

struct __align__(FOURS * sizeof(Four<X_KIND>)) Row { Four<X_KIND> parts[FOURS]; };

extern "C" __global__ void __launch_bounds__(32 * WARPS) convolve(const __grid_constant__ Params p) {
  const i64 across = (p.channels / EACH + 31) / 32, runs = (p.length + RUN * WARPS - 1) / (RUN * WARPS);
  i64 index = blockIdx.x;
  const int channel = (int)(index % across) * 32 * EACH + threadIdx.x % 32 * EACH; index /= across;
  const i64 b = index / runs, first = (index % runs * WARPS + threadIdx.x / 32) * RUN;
  if (channel >= p.channels || first >= p.length) return;
  const X* x = (const X*)p.x + b * p.x_b + first * p.x_l + channel;
  Row rows[W - 1 + RUN];
#pragma unroll
  for (int i = 0; i < W - 1 + RUN; ++i) {
    const int t = i - (W - 1);
    rows[i] = {};
    if (first + t >= 0 && first + t < p.length) rows[i] = *reinterpret_cast<const Row*>(x + t * (int)p.x_l);
  }
  float weights[EACH][W], bias[EACH];
#pragma unroll
  for (int j = 0; j < EACH; ++j)
#pragma unroll
    for (int k = 0; k < W; k += 4) {
      float f[4];
      widen4<W_KIND>(fetch4<W_KIND>((const Weight*)p.weight + (i64)(channel + j) * W + k), f);
#pragma unroll
      for (int m = 0; m < 4; ++m) weights[j][k + m] = f[m];
    }
#pragma unroll
  for (int j = 0; j < EACH; j += 4) {
    float f[4] = {};
    if (HAS_BIAS) widen4<W_KIND>(fetch4<W_KIND>((const Weight*)p.bias + channel + j), f);
#pragma unroll
    for (int m = 0; m < 4; ++m) bias[j + m] = f[m];
  }
  X* y = (X*)p.y + (b * p.length + first) * p.channels + channel;
  float window[W][EACH];
  auto enter = [&](int i) {
#pragma unroll
    for (int q = 0; q < FOURS; ++q) {
      float f[4];
      widen4<X_KIND>(rows[i].parts[q], f);
#pragma unroll
      for (int m = 0; m < 4; ++m) window[i % W][4 * q + m] = f[m];
    }
  };
#pragma unroll
  for (int i = 0; i < W - 1; ++i) enter(i);
#pragma unroll
  for (int t = 0; t < RUN; ++t) {
    enter(W - 1 + t);
    if (first + t >= p.length) break;
    Row out;
#pragma unroll
    for (int q = 0; q < FOURS; ++q) {
      float f[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int j = 4 * q + m;
        float v = bias[j];
#pragma unroll
        for (int k = 0; k < W; ++k) v = fmaf(weights[j][k], window[(t + k) % W][j], v);
        f[m] = SILU ? v * sigmoid(v) : v;
      }
      out.parts[q] = narrow4<X_KIND>(f);
    }
#if STREAM
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" :: "l"(y + t * (int)p.channels), "r"(out.parts[0].bits.x), "r"(out.parts[0].bits.y), "r"(out.parts[FOURS - 1].bits.x), "r"(out.parts[FOURS - 1].bits.y));
#else
    *reinterpret_cast<Row*>(y + t * (int)p.channels) = out;
#endif
  }
}
