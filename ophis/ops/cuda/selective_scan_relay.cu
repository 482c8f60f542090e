// The selective scan, forward, for n up to 16 where channels are few: 16 channels a block, whose warps run through time
// in a relay. Eight positions are a leg, and RUNNERS warps take the legs in turn.
//
// A runner takes its leg from a state of zeros, and keeps the decays, while those before it do the same. When it is handed
// the state that really comes in, it hands on the one that leaves, one multiplication by the decay of the whole leg and
// addition later, and adds to its outputs what that state gives, decaying from position to position. So all exponentials
// but one a leg are taken once, by as many warps as there is room for, and in sequence there is one short step a leg.
//
// A thread holds two neighbouring channels with four states each; as preparer of a leg, four channels at one position.
// Sums over the states go through the tensor cores, as products of the states with C.
#include "selective_scan.cuh"

constexpr int CHANNELS = 16, LEG = 8, TURN = RUNNERS * LEG;  // positions from one leg of a runner to its next
static_assert(N == 16 && RUNNERS <= 16);                     // there are 16 barriers

using X = Stored<X_KIND>::type;
using DT = Stored<DT_KIND>::type;
using Z = Stored<Z_KIND>::type;
using BC = Stored<BC_KIND>::type;

// What comes from global memory, of which each thread has its own places.
struct Coming {
  Four<X_KIND> x[32];
  Four<DT_KIND> dt[32];
  Four<Z_KIND> z[HAS_Z ? 32 : 1];
  Four<BC_KIND> B[32], C[32];
};

// Of a runner. Where its rows are and how they are turned keeps what is read or written together in different banks.
struct Runner {
  Coming coming[3];      // of this leg, of its next one, and of the one after that, which is on its way
  float4 steps[LEG][8];  // step, step * input, of two channels; in the later half of a leg, turned
  float4 B[LEG][4];
  float y[LEG][16];      // see `place_of_y`
  float4 bias[4], skip[4];
  float4 baton[2][2][32];  // the state handed to this runner, in alternate turns: in one place it takes 1.5 % longer
  float4 left[2][32];    // that nobody reads, and
  unsigned long long given;  // a signal given before the start: see where they are used
};

struct Shared {
  Runner runners[RUNNERS];
};

// The outputs are written at the positions k and k + 4 by four threads for each pair of channels, and read four channels
// at once at these positions.
__device__ __forceinline__ int place_of_y(int position, int channel) {
  const int row = position < 4 ? position : (position ^ 1);
  return row * 16 + (channel ^ (position / 2 % 2 * 8));
}

// Products of tf32, 11 bits, go far enough for outputs of bfloat16. Others need both halves of a number.
constexpr bool HALVES = X_KIND != BFLOAT16 || BC_KIND == FLOAT32;
// What is cut off the states is, on average, this part of them.
constexpr float MADE_UP = HALVES ? 1.f : 1.000352f;

__device__ __forceinline__ float high_half(float f) { return __uint_as_float(__float_as_uint(f) & 0xffffe000u); }

// Which position of a leg a thread prepares; pairs of threads' positions are four apart.
__device__ __forceinline__ int position_of(int thread) { return thread / 8 + thread / 4 % 2 * 4; }

// The outputs of a leg, of this thread's channels at the positions k and k + 4 for k = thread % 4.
struct Outputs {
  float C[4], C_low[4];  // at position position_of(thread), of this thread's states
  float y[2][2];         // positions, channels

  __device__ __forceinline__ void begin(const Four<BC_KIND>& of_leg) {
    widen4<BC_KIND>(of_leg, C);
    if (BC_KIND == FLOAT32)
#pragma unroll
      for (int s = 0; s < 4; ++s) C_low[s] = C[s] - high_half(C[s]), C[s] = high_half(C[s]);
  }

  // Position T: the columns of the product are all C of the leg, one of which is T's.
  template <int T, bool FIRST> __device__ __forceinline__ void add(const float (&h)[2][4], int quarter) {
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
    // Column 2 k is position k, column 2 k + 1 position k + 4; a thread has the columns 2 k and 2 k + 1 for its quarter k.
    const bool mine = quarter == T % 4;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (FIRST) y[T / 4][c] = mine ? sums[2 * c + T / 4] : T % 4 == 0 ? 0.f : y[T / 4][c];
      else if (mine) y[T / 4][c] += sums[2 * c + T / 4];
    }
  }
};

template <bool FIRST, class A, class B> struct Choice { using type = A; };
template <class A, class B> struct Choice<false, A, B> { using type = B; };

template <class T, class Bytes> __device__ __forceinline__ T* further(T* from, Bytes bytes) {
  return (T*)((const char*)from + bytes);
}

template <int I> struct Index { static constexpr int value = I; };

template <class Do> __device__ __forceinline__ void each_position(Do what) {
  what(Index<0>()), what(Index<1>()), what(Index<2>()), what(Index<3>());
  what(Index<4>()), what(Index<5>()), what(Index<6>()), what(Index<7>());
}

// States of two channels, four each, and their places in shared memory.
__device__ __forceinline__ void put_states(float4 (&to)[2][32], int thread, const float (&h)[2][4]) {
  to[0][thread] = make_float4(h[0][0], h[0][1], h[0][2], h[0][3]);
  to[1][thread] = make_float4(h[1][0], h[1][1], h[1][2], h[1][3]);
}

__device__ __forceinline__ void get_states(const float4 (&from)[2][32], int thread, float (&h)[2][4]) {
  const float4 v = from[0][thread], w = from[1][thread];
  h[0][0] = v.x, h[0][1] = v.y, h[0][2] = v.z, h[0][3] = v.w;
  h[1][0] = w.x, h[1][1] = w.y, h[1][2] = w.z, h[1][3] = w.w;
}

extern "C" __global__ void __launch_bounds__(32 * RUNNERS, 1) relay(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int runner = of_warp(threadIdx.x / 32), thread = settled(threadIdx.x % 32);
  Runner& m = shared.runners[runner];

  const i64 teams = (p.channels + CHANNELS - 1) / CHANNELS;
  const i64 first_channel = blockIdx.x % teams * CHANNELS, b = blockIdx.x / teams;
  const int length = (int)p.length, legs = (length + LEG - 1) / LEG;

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
  auto keep = [&](const float (&h)[2][4], int at) {
    if (!KEEP || at % KEEP_EVERY != 0) return;
    const i64 row = b * ((p.length + KEEP_EVERY - 1) / KEEP_EVERY) + at / KEEP_EVERY;
    Four<KEPT_KIND>* to = (Four<KEPT_KIND>*)p.kept + kept_at(p.channels, row, channel, quarter * 4);
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (channel + c < p.channels) to[c * 32] = narrow4<KEPT_KIND>(h[c]);
  };
  float h[2][4];
  float rates[2][4];
  load(rates, p.A, 0, p.states);
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int s = 0; s < 4; ++s) rates[c][s] *= LOG2E;
  if (runner == 0) {
    load(h, PACKED ? nullptr : p.initial, b, p.states);
    put_states(m.baton[0], thread, h);
  }

  // As preparer: four channels at one position of a leg.
  const int item_channel = quarter * 4, item_step = position_of(thread);
  const i64 c = first_channel + item_channel, group = first_channel / (p.channels / p.groups);
  const int within = (int)least(4, p.channels - c), states_within = (int)p.states - item_channel;  // may be negative
  const bool y_whole = WHOLE || p.channels % 4 == 0;
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
  if (thread == 0) create_signal(&m.given), signal(&m.given);
  __syncwarp();
  const int first = runner * LEG;
  // Where this thread's numbers of a leg lie: a place that all threads of the warp have in common, and bytes from there on,
  // which 32 bits can count where channels are neighbours.
  using Bytes = Choice<WHOLE, unsigned, i64>::type;
  auto bytes_to = [&](const Strides& strides, i64 apart, int size) {
    return (Bytes)((item_step * strides.l + item_channel * apart) * size);
  };
  const Bytes to_x = bytes_to(p.sx, p.sx.d, sizeof(X)), to_dt = bytes_to(p.sdt, p.sdt.d, sizeof(DT));
  const Bytes to_z = bytes_to(p.sz, p.sz.d, sizeof(Z)), to_y = (Bytes)((item_step * p.channels + item_channel) * sizeof(X));
  const Bytes to_B = bytes_to(p.sB, 1, sizeof(BC)), to_C = bytes_to(p.sC, 1, sizeof(BC));
  const X* x_ahead = (const X*)p.x + (b * p.sx.b + first_channel * p.sx.d + first * p.sx.l);
  const DT* dt_ahead = (const DT*)p.dt + (b * p.sdt.b + first_channel * p.sdt.d + first * p.sdt.l);
  const Z* z_ahead = (const Z*)p.z + (b * p.sz.b + first_channel * p.sz.d + first * p.sz.l);
  const BC* B_ahead = (const BC*)p.B + (b * p.sB.b + group * p.sB.d + first * p.sB.l);
  const BC* C_ahead = (const BC*)p.C + (b * p.sC.b + group * p.sC.d + first * p.sC.l);
  X* y = (X*)p.y + ((b * p.length + first) * p.channels + first_channel);
  auto send_for = [&](int at, Coming& to) {
    const bool there = at + item_step < length;
    const int count = there ? within : 0, states = there ? states_within : 0;
    copy4<X_KIND, WHOLE>(&to.x[thread], further(x_ahead, to_x), p.sx.d, count);
    copy4<DT_KIND, WHOLE>(&to.dt[thread], further(dt_ahead, to_dt), p.sdt.d, count);
    if (HAS_Z) copy4<Z_KIND, WHOLE>(&to.z[thread], further(z_ahead, to_z), p.sz.d, count);
    copy4<BC_KIND, WHOLE>(&to.B[thread], further(B_ahead, to_B), 1, states);
    copy4<BC_KIND, WHOLE>(&to.C[thread], further(C_ahead, to_C), 1, states);
    x_ahead += TURN * p.sx.l, dt_ahead += TURN * p.sdt.l;
    if (HAS_Z) z_ahead += TURN * p.sz.l;
    B_ahead += TURN * p.sB.l, C_ahead += TURN * p.sC.l;
  };
  auto prepare = [&](int at, const Coming& from) {
    // Past the end the item is zeros; a step of zero leaves the state as it is. A product, since a condition becomes a
    // branch around every softplus.
    const float there = at + item_step < length ? 1.f : 0.f;
    const float4 bias4 = m.bias[quarter];
    const float bias[4] = {bias4.x, bias4.y, bias4.z, bias4.w};
    float step[4], input[4], B[4];
    widen4<DT_KIND>(from.dt[thread], step);
    widen4<X_KIND>(from.x[thread], input);
    widen4<BC_KIND>(from.B[thread], B);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      step[k] = there * step_of(step[k], bias[k]);
      input[k] *= step[k];
    }
    float4* to = &m.steps[item_step][item_channel / 2];
    to[item_step / 4] = make_float4(step[0], input[0], step[1], input[1]);
    to[1 - item_step / 4] = make_float4(step[2], input[2], step[3], input[3]);
    m.B[item_step][quarter] = make_float4(B[0], B[1], B[2], B[3]);
  };
  auto leave = [&](const Outputs& out) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<float2*>(&m.y[0][0] + place_of_y(quarter + 4 * i, pair * 2)) = make_float2(out.y[i][0], out.y[i][1]);
  };
  auto finish = [&](int at, const Coming& from) {
    const float4 v = *reinterpret_cast<const float4*>(&m.y[0][0] + place_of_y(item_step, item_channel)), skip4 = m.skip[quarter];
    const float skip[4] = {skip4.x, skip4.y, skip4.z, skip4.w};
    float sum[4] = {v.x, v.y, v.z, v.w}, input[4], gate[4];
    widen4<X_KIND>(from.x[thread], input);
    if (HAS_Z) widen4<Z_KIND>(from.z[thread], gate);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum[k] = HAS_D ? fmaf(MADE_UP, sum[k], skip[k] * input[k]) : MADE_UP * sum[k];
      if (HAS_Z) sum[k] *= gate[k] * sigmoid(gate[k]);
    }
    put4<X_KIND>(further(y, to_y), 0, sum, y_whole, at + item_step < length ? within : 0);
    y += TURN * p.channels;
  };

  int coming = 0;  // sequence, the first that starts in this leg or later
  auto starts_in = [&](int at) {  // a bit a position at which a sequence starts
    unsigned starts = 0;
    while (coming < p.sequences && p.offsets[coming] < at) ++coming;
    for (int k = coming; k < p.sequences && p.offsets[k] < least(length, at + LEG); ++k) starts |= 1u << (p.offsets[k] - at);
    return starts;
  };
  for (int i = 0; i < 3; ++i) {
    send_for(first + i * TURN, m.coming[i]);
    commit_copies();
  }
  await_copies_but<2>();
  prepare(first, m.coming[0]);
  int turn = 0, now = 0;  // places in `baton` and `coming`
#pragma unroll 1
  for (int leg = runner; leg < legs; leg += RUNNERS, turn ^= 1) {
    const int next = now < 2 ? now + 1 : 0;
    const int at = leg * LEG;
    const unsigned starts = PACKED ? starts_in(at) : 0;
    float decays[LEG][2][4], steps[2] = {};
    Outputs out;
    out.begin(m.coming[now].C[thread]);
#pragma unroll
    for (int s = 0; s < 4; ++s) h[0][s] = h[1][s] = 0.f;
    __syncwarp();
    // Legs in which no sequence starts are most: they go without asking at each position.
    auto run = [&](auto has_starts, auto position) {
      constexpr int t = position.value;
      if (has_starts.value && starts >> t & 1) {
        if (at + t > 0) store(p.final_state, h, sequence_at(p, at + t - 1), p.states);
        load(h, p.initial, sequence_at(p, at + t), p.states);
      }
      const float4 v = m.steps[t][pair ^ (t / 4)], B4 = m.B[t][quarter];
      const float dt[2] = {v.x, v.z}, u[2] = {v.y, v.w}, B[4] = {B4.x, B4.y, B4.z, B4.w};
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          decays[t][c][s] = exp2_fast(dt[c] * rates[c][s]);
          h[c][s] = fmaf(decays[t][c][s], h[c][s], u[c] * B[s]);
        }
      steps[0] += dt[0], steps[1] += dt[1];
      out.template add<t, true>(h, quarter);
    };
    if (PACKED && starts) each_position([&](auto position) { run(Index<1>(), position); });
    else each_position([&](auto position) { run(Index<0>(), position); });
    __syncwarp();
    await_copies_but<1>();
    prepare(at + TURN, m.coming[next]);

    // What others wait for comes first. The compiler would put off the decay of the leg until after the barrier; but it
    // stores what it is told to, and moves nothing across a loop, such as the one in which a signal is waited for, and be it
    // one given long ago. A second one, behind the barrier, costs more than what is done too early there: 0.598 ms for 0.588.
    float through[2][4];
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s) through[c][s] = exp2_fast(steps[c] * rates[c][s]);
    put_states(m.left, thread, through);
    await_signal(&m.given, 0);
    if (leg > 0) await_barrier(runner, 64);
    float incoming[2][4];
    get_states(m.baton[turn], thread, incoming);
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s)
        if (!PACKED || !starts) h[c][s] = fmaf(through[c][s], incoming[c][s], h[c][s]);
    if (leg + 1 < legs) {
      const int other = runner + 1 < RUNNERS ? runner + 1 : 0;
      put_states(shared.runners[other].baton[other ? turn : turn ^ 1], thread, h);
      pass_barrier(other, 64);
    }

    keep(incoming, at);
    auto correct = [&](auto has_starts, auto position) {
      constexpr int t = position.value;
      const bool starts_here = has_starts.value && starts >> t & 1;
      if (starts_here && !(starts & ((1u << t) - 1)) && at + t > 0)  // what the first sequence to end here lacks
        store(p.final_state, incoming, sequence_at(p, at + t - 1), p.states, true);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) incoming[c][s] = starts_here ? 0.f : incoming[c][s] * decays[t][c][s];
      out.template add<t, false>(incoming, quarter);
    };
    if (PACKED && starts) each_position([&](auto position) { correct(Index<1>(), position); });
    else each_position([&](auto position) { correct(Index<0>(), position); });
    leave(out);
    __syncwarp();
    finish(at, m.coming[now]);
    send_for(at + 3 * TURN, m.coming[now]);
    commit_copies();
    now = next;
  }
  if ((legs - 1) % RUNNERS == runner) store(p.final_state, h, PACKED ? sequence_at(p, length - 1) : b, p.states);
}
