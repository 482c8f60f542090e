// The selective scan, forward, for n up to 16: each warp takes 16 channels with all their states through time, and asks
// no other warp for anything but a state.
//
// A thread holds two neighbouring channels with four states each. Eight positions, a leg, are prepared at once: thread
// by thread four channels at one position, through shared memory of the warp's own. Sums over the states go through the
// tensor cores, as products of the states with C.
//
// Where channels are few, RUNNERS warps share them and run the legs in turn, as in a relay: a warp runs its leg from a
// state of zeros, keeping every decay, while those before it do the same; then it is handed the state that comes into
// the leg, hands on the one that leaves it, which takes one multiplication and addition, and adds to its outputs what
// the state handed to it gives. All exponentials are taken once, by as many warps as there is room for.
#include "selective_scan.cuh"

constexpr int CHANNELS = 16, LEG = 8;
static_assert(N == 16 && WARPS % RUNNERS == 0 && WARPS <= 16);  // there are 16 barriers

using X = Stored<X_KIND>::type;
using DT = Stored<DT_KIND>::type;
using Z = Stored<Z_KIND>::type;
using BC = Stored<BC_KIND>::type;

// Of a warp. Of what comes from global memory each thread has its own places, twice, so that it can be on its way while
// the leg before is run.
struct Warp {
  Four<X_KIND> x[2][32];
  Four<DT_KIND> dt[2][32];
  Four<Z_KIND> z[HAS_Z ? 2 : 1][HAS_Z ? 32 : 1];
  Four<BC_KIND> B[2][32], C[2][32];
  float4 steps[LEG][8];  // step, step * input, of two channels
  float4 B_wide[LEG][4];
  float y[LEG][20];      // of 16 channels; so long a row meets itself in no bank
  float4 bias[4], skip[4];
  float4 baton[RUNNERS > 1 ? 2 : 1][RUNNERS > 1 ? 32 : 1];  // the state handed to this warp
};

struct Shared {
  Warp warps[WARPS];
};

// Products of tf32, 11 bits, go far enough for outputs of bfloat16. Others need both halves of a number.
constexpr bool HALVES = X_KIND != BFLOAT16 || BC_KIND == FLOAT32;
// What is cut off a number is, over all numbers, this part of it.
constexpr float MADE_UP = HALVES ? 1.f : 1.000352f;

__device__ __forceinline__ float high_half(float f) { return __uint_as_float(__float_as_uint(f) & 0xffffe000u); }

// The outputs of a leg, of this thread's channels at the positions 2 k and 2 k + 1 for k = thread % 4.
struct Outputs {
  float C[4], C_low[4];  // at position thread / 4, of this thread's states
  float y[2][2];         // positions, channels

  // Position T: the columns of the product are all C of the leg, one of which is T's.
  template <int T, bool FIRST> __device__ __forceinline__ void add(const float (&h)[2][4]) {
    float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      const float a[4] = {h[0][s], h[1][s], h[0][s + 1], h[1][s + 1]};
      if constexpr (HALVES) {
        float high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) high[j] = high_half(a[j]), low[j] = a[j] - high[j];
        multiply_tf32(sums, high, C[s], C[s + 1]);
        multiply_tf32(sums, low, C[s], C[s + 1]);
        if (BC_KIND == FLOAT32) multiply_tf32(sums, high, C_low[s], C_low[s + 1]);
      } else {
        multiply_tf32(sums, a, C[s], C[s + 1]);
      }
    }
    const bool mine = threadIdx.x % 4 == T / 2;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (FIRST) y[T % 2][c] = mine ? sums[2 * c + T % 2] : T < 2 ? 0.f : y[T % 2][c];
      else if (mine) y[T % 2][c] += sums[2 * c + T % 2];
    }
  }
};

template <int I> struct Index { static constexpr int value = I; };

template <class Do> __device__ __forceinline__ void each_position(Do what) {
  what(Index<0>()), what(Index<1>()), what(Index<2>()), what(Index<3>());
  what(Index<4>()), what(Index<5>()), what(Index<6>()), what(Index<7>());
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) relay(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char memory[];
  const int warp = of_warp(threadIdx.x / 32), thread = threadIdx.x % 32;
  Warp& m = reinterpret_cast<Shared*>(memory)->warps[warp];
  const int runner = warp % RUNNERS, next = warp - runner + (runner + 1) % RUNNERS;

  const i64 groups_of_channels = (p.channels + CHANNELS - 1) / CHANNELS;
  i64 index = ((i64)blockIdx.x * WARPS + warp) / RUNNERS;
  if (index >= groups_of_channels * p.segments * p.batch) return;
  const i64 first_channel = index % groups_of_channels * CHANNELS; index /= groups_of_channels;
  const i64 segment = index % p.segments, b = index / p.segments;
  const int start = (int)(segment * p.segment), end = (int)least(p.length, start + p.segment);
  const int legs = (end - start + LEG - 1) / LEG;

  // As keeper of states.
  const int pair = thread / 4, quarter = thread % 4;
  const i64 channel = first_channel + pair * 2;
  auto load = [&](float (&to)[2][4], const float* from, i64 row, i64 width) {  // (rows, d, width)
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const i64 n = quarter * 4 + s;
        to[c][s] = from && channel + c < p.channels && n < width ? from[(row * p.channels + channel + c) * width + n] : 0.f;
      }
  };
  auto store = [&](float* to, const float (&from)[2][4], i64 row, i64 width, bool more = false) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const i64 n = quarter * 4 + s, at = (row * p.channels + channel + c) * width + n;
        if (channel + c < p.channels && n < width) to[at] = more ? to[at] + from[c][s] : from[c][s];
      }
  };
  float rates[2][4], h[2][4];
  load(rates, p.A, 0, p.states);
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int s = 0; s < 4; ++s) rates[c][s] *= LOG2E;
  if (segment > 0) load(h, p.carry, b * p.segments + segment, N);
  else load(h, PACKED ? nullptr : p.initial, b, p.states);
  auto hand_to = [&](float4 (&baton)[RUNNERS > 1 ? 2 : 1][RUNNERS > 1 ? 32 : 1]) {
    baton[0][thread] = make_float4(h[0][0], h[0][1], h[0][2], h[0][3]);
    baton[1][thread] = make_float4(h[1][0], h[1][1], h[1][2], h[1][3]);
  };
  if (RUNNERS > 1 && runner == 0) hand_to(m.baton);

  // As preparer: four channels at one position of a leg.
  const int item_channel = quarter * 4, item_step = pair;
  const i64 c = first_channel + item_channel, group = first_channel / (p.channels / p.groups);
  const int within = (int)least(4, p.channels - c), states_within = (int)p.states - item_channel;  // may be negative
  const bool y_whole = p.channels % 4 == 0;
  if (pair == 0) {
    float bias[4], skip[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      bias[k] = HAS_BIAS && k < within ? p.bias[c + k] : 0.f;
      skip[k] = HAS_D && k < within ? p.D[c + k] : 0.f;
    }
    m.bias[quarter] = make_float4(bias[0], bias[1], bias[2], bias[3]);
    m.skip[quarter] = make_float4(skip[0], skip[1], skip[2], skip[3]);
  }
  __syncwarp();
  const i64 t0 = start + runner * LEG + item_step;
  const X* x_ahead = (const X*)p.x + (b * p.sx.b + c * p.sx.d + t0 * p.sx.l);
  const DT* dt_ahead = (const DT*)p.dt + (b * p.sdt.b + c * p.sdt.d + t0 * p.sdt.l);
  const Z* z_ahead = (const Z*)p.z + (b * p.sz.b + c * p.sz.d + t0 * p.sz.l);
  const BC* B_ahead = (const BC*)p.B + (b * p.sB.b + group * p.sB.d + item_channel + t0 * p.sB.l);
  const BC* C_ahead = (const BC*)p.C + (b * p.sC.b + group * p.sC.d + item_channel + t0 * p.sC.l);
  X* y = (X*)p.y + ((b * p.length + t0) * p.channels + c);
  auto send_for = [&](int at, int turn) {
    const bool there = at + item_step < end;
    const int count = there ? within : 0, states = there ? states_within : 0;
    copy4<X_KIND, WHOLE>(&m.x[turn][thread], x_ahead, p.sx.d, count);
    copy4<DT_KIND, WHOLE>(&m.dt[turn][thread], dt_ahead, p.sdt.d, count);
    if (HAS_Z) copy4<Z_KIND, WHOLE>(&m.z[turn][thread], z_ahead, p.sz.d, count);
    copy4<BC_KIND, WHOLE>(&m.B[turn][thread], B_ahead, 1, states);
    copy4<BC_KIND, WHOLE>(&m.C[turn][thread], C_ahead, 1, states);
    x_ahead += RUNNERS * LEG * p.sx.l, dt_ahead += RUNNERS * LEG * p.sdt.l;
    if (HAS_Z) z_ahead += RUNNERS * LEG * p.sz.l;
    B_ahead += RUNNERS * LEG * p.sB.l, C_ahead += RUNNERS * LEG * p.sC.l;
  };

  auto keep = [&](const float (&state)[2][4], int at) {  // (b, l / KEEP_EVERY, d, N)
    if (!KEEP || at % KEEP_EVERY != 0) return;
    const i64 row = b * ((p.length + KEEP_EVERY - 1) / KEEP_EVERY) + at / KEEP_EVERY;
    float4* to = reinterpret_cast<float4*>(p.kept + (row * p.channels + channel) * N + quarter * 4);
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (channel + c < p.channels) to[c * (N / 4)] = make_float4(state[c][0], state[c][1], state[c][2], state[c][3]);
  };

  int coming = 0;  // sequence, the first that starts in this leg or later
  if (PACKED && start > 0) coming = sequence_at(p, start - 1) + 1;

  send_for(start + runner * LEG, 0);
  int turn = 0;
#pragma unroll 1
  for (int leg = runner; leg < legs; leg += RUNNERS, turn ^= 1) {
    const int at = start + leg * LEG;
    Outputs out;
    await_copies();
    {
      // Past the end the item is zeros; a step of zero leaves the state as it is. A product, since a condition becomes a
      // branch around every softplus.
      const float there = at + item_step < end ? 1.f : 0.f;
      const float4 bias4 = m.bias[quarter];
      const float bias[4] = {bias4.x, bias4.y, bias4.z, bias4.w};
      float step[4], input[4], wide[4];
      widen4<DT_KIND>(m.dt[turn][thread], step);
      widen4<X_KIND>(m.x[turn][thread], input);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        step[k] = there * step_of(step[k], bias[k]);
        input[k] *= step[k];
      }
      float4* to = &m.steps[item_step][item_channel / 2];
      to[0] = make_float4(step[0], input[0], step[1], input[1]);
      to[1] = make_float4(step[2], input[2], step[3], input[3]);
      widen4<BC_KIND>(m.B[turn][thread], wide);
      m.B_wide[item_step][quarter] = make_float4(wide[0], wide[1], wide[2], wide[3]);
      widen4<BC_KIND>(m.C[turn][thread], out.C);
      if (BC_KIND == FLOAT32)
#pragma unroll
        for (int s = 0; s < 4; ++s) out.C_low[s] = out.C[s] - high_half(out.C[s]), out.C[s] = high_half(out.C[s]);
    }
    unsigned starts = 0;  // a bit a position at which a sequence does
    if (PACKED) {
      while (coming < p.sequences && p.offsets[coming] < at) ++coming;
      for (int k = coming; k < p.sequences && p.offsets[k] < least(end, at + LEG); ++k) starts |= 1u << (p.offsets[k] - at);
    }
    __syncwarp();
    if (leg + RUNNERS < legs) send_for(at + RUNNERS * LEG, turn ^ 1);

    if (RUNNERS == 1) keep(h, at);
    float a[RUNNERS > 1 ? LEG : 1][2][4];
    float total[2] = {0.f, 0.f};  // of the steps
    if (RUNNERS > 1)
#pragma unroll
      for (int s = 0; s < 4; ++s) h[0][s] = h[1][s] = 0.f;
    each_position([&](auto position) {
      constexpr int t = position.value;
      if (PACKED && starts >> t & 1) {
        if (at + t > 0) store(p.final_state, h, sequence_at(p, at + t - 1), p.states);
        load(h, p.initial, sequence_at(p, at + t), p.states);
      }
      const float4 v = m.steps[t][pair], B4 = m.B_wide[t][quarter];
      const float dt[2] = {v.x, v.z}, u[2] = {v.y, v.w}, B[4] = {B4.x, B4.y, B4.z, B4.w};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          float& decay = a[RUNNERS > 1 ? t : 0][c][s];
          decay = exp2_fast(dt[c] * rates[c][s]);
          h[c][s] = fmaf(decay, h[c][s], u[c] * B[s]);
        }
        total[c] += dt[c];
      }
      out.add<t, true>(h);
    });

    if constexpr (RUNNERS > 1) {
      float g[2][4];  // what is left of the state that came into the leg
      float through[2][4];
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) through[c][s] = PACKED && starts ? 0.f : exp2_fast(total[c] * rates[c][s]);
      if (leg > 0) await_barrier(warp, 64);
      const float4 v = m.baton[0][thread], w = m.baton[1][thread];
      g[0][0] = v.x, g[0][1] = v.y, g[0][2] = v.z, g[0][3] = v.w;
      g[1][0] = w.x, g[1][1] = w.y, g[1][2] = w.z, g[1][3] = w.w;
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) h[c][s] = fmaf(through[c][s], g[c][s], h[c][s]);
      if (leg + 1 < legs) {
        hand_to(reinterpret_cast<Shared*>(memory)->warps[next].baton);
        pass_barrier(next, 64);
      }
      keep(g, at);
      each_position([&](auto position) {
        constexpr int t = position.value;
        if (PACKED && starts >> t & 1) {
          if (at + t > 0 && !(starts & ((1u << t) - 1))) store(p.final_state, g, sequence_at(p, at + t - 1), p.states, true);
#pragma unroll
          for (int s = 0; s < 4; ++s) g[0][s] = g[1][s] = 0.f;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int s = 0; s < 4; ++s) g[c][s] *= a[t][c][s];
        out.add<t, false>(g);
      });
    }
    *reinterpret_cast<float2*>(&m.y[quarter * 2][pair * 2]) = make_float2(out.y[0][0], out.y[0][1]);
    *reinterpret_cast<float2*>(&m.y[quarter * 2 + 1][pair * 2]) = make_float2(out.y[1][0], out.y[1][1]);
    __syncwarp();
    if (at + item_step < end) {
      const float4 v = *reinterpret_cast<const float4*>(&m.y[item_step][item_channel]), skip4 = m.skip[quarter];
      const float skip[4] = {skip4.x, skip4.y, skip4.z, skip4.w};
      float sum[4] = {v.x, v.y, v.z, v.w}, input[4], gate[4];
      widen4<X_KIND>(m.x[turn][thread], input);
      if (HAS_Z) widen4<Z_KIND>(m.z[turn][thread], gate);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[k] = HAS_D ? fmaf(MADE_UP, sum[k], skip[k] * input[k]) : MADE_UP * sum[k];
        if (HAS_Z) sum[k] *= gate[k] * sigmoid(gate[k]);
      }
      put4<X_KIND>(y, 0, sum, y_whole, within);
    }
    y += RUNNERS * LEG * p.channels;
  }
  if (segment == p.segments - 1 && (legs - 1) % RUNNERS == runner)
    store(p.final_state, h, PACKED ? sequence_at(p, p.length - 1) : b, p.states);
}
