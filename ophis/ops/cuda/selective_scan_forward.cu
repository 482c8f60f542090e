// The selective scan, forward; and, with other names for its inputs, the carry of either direction between segments.
//
// A block holds CHANNELS channels, and its threads have two trades. A keeper has, for two neighbouring channels, S of
// their states in registers; LANES of them share the channels and go through time together. What all of them need of a
// position - its step, its step times input, B, C - the preparers lay out in shared memory, STEPS positions (a chunk)
// at a time and four channels (an item) at once; there the keepers leave their parts of the outputs, which the preparers
// sum, gate and write. While a chunk is kept, the next is being prepared and the last one finished, so that a keeper has
// nothing but its exponentials to wait for, of which a multiprocessor takes 16 a clock.
#include "selective_scan.cuh"

constexpr int PER = 2;  // channels of a keeper
constexpr int KEEPERS = CHANNELS / PER * LANES;
constexpr int THREADS = KEEPERS + PREPARERS;
constexpr int OWNERS = CHANNELS / PER;                              // sets of channels that a keeper may have
constexpr int BESIDE = 32 / LANES;                                  // of them in a warp
constexpr int ACROSS = CHANNELS / 4;                                // items side by side
constexpr int ITEMS = (STEPS * ACROSS + PREPARERS - 1) / PREPARERS; // of a preparer: positions of its four channels
constexpr int DOWN = PREPARERS / ACROSS;                            // positions from one of them to the next
constexpr int VECTORS = 2 * S / 4;         // float4s of B and C together for a keeper and a position
constexpr int OF_B = S == 2 ? 1 : S / 4;   // of them, those of B; with two states one float4 has both
constexpr int BC_ITEMS = (STEPS * VECTORS * LANES + PREPARERS - 1) / PREPARERS;
static_assert(S * LANES == N && (S == 2 || S % 4 == 0) && STEPS % (2 * UNROLL) == 0 && KEEP_EVERY % STEPS == 0);
static_assert(KEEPERS % 32 == 0 && PREPARERS % 32 == 0 && PREPARERS % ACROSS == 0 && LANES % 2 == 0);

using X = Stored<X_KIND>::type;
using DT = Stored<DT_KIND>::type;
using Z = Stored<Z_KIND>::type;
using BC = Stored<BC_KIND>::type;

enum What { OUTPUTS, STATES, GRADIENTS };  // what a kernel is after; the last two are for the carry alone


struct Chunk {
  float2 steps[STEPS][CHANNELS];            // step, step * input
  float4 matrices[STEPS][VECTORS][LANES];   // B, then C, of S states for each keeper
  int starts[PACKED ? (STEPS + 3) / 4 * 4 : 4];  // the sequence that starts there, or -1; that ends, in GRADIENTS
};

struct Shared {
  Chunk chunks[2];
  float4 outputs[2][STEPS][LANES / 2][OWNERS];  // two keepers' in each; the carry does without
};

// Where in a row an owner's numbers are: so turned, neither eight neighbouring ones nor every second of sixteen, as
// items read and write them, meet in a bank.
__device__ __forceinline__ int place(int owner) {
  return OWNERS < 8 ? owner : (owner & ~7) | ((owner + (owner >> 3)) & 7);
}

// What a keeper reads of one position.
struct Position {
  float dt[PER], v[PER], B[S], C[S];  // v: dt * input
};

// GRADIENTS go through a segment backwards.
template <What WHAT>
__device__ __forceinline__ void scan(const Params& p) {
  constexpr bool BACK = WHAT == GRADIENTS;
  extern __shared__ __align__(16) char memory[];
  Shared& m = *reinterpret_cast<Shared*>(memory);

  const i64 blocks = (p.channels + CHANNELS - 1) / CHANNELS;
  i64 index = blockIdx.x;
  const i64 first_channel = index % blocks * CHANNELS; index /= blocks;
  const i64 runs = WHAT == OUTPUTS ? p.segments : p.segments - 1;
  const i64 segment = index % runs + (BACK ? 1 : 0);
  const i64 b = index / runs;
  const int start = (int)(segment * p.segment), end = (int)least(p.length, start + p.segment);
  const int count = (end - start + STEPS - 1) / STEPS;
  const int first = start + (BACK ? count - 1 : 0) * STEPS;
  constexpr int TURN = BACK ? -STEPS : STEPS;

  if (threadIdx.x < KEEPERS) {
    const int tid = threadIdx.x;
    const int own = tid / 32 * BESIDE + tid % BESIDE, lane = tid % 32 / BESIDE;
    const i64 channel = first_channel + own * PER;
    float rates[PER][S], h[PER][S];
    auto load = [&](float (&to)[PER][S], const float* from, i64 row, i64 width) {  // (rows, d, width)
#pragma unroll
      for (int c = 0; c < PER; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const i64 n = lane * S + s;
          const bool there = from && channel + c < p.channels && n < width;
          to[c][s] = there ? from[(row * p.channels + channel + c) * width + n] : 0.f;
        }
    };
    auto store = [&](float* to, i64 row, i64 width) {
#pragma unroll
      for (int c = 0; c < PER; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const i64 n = lane * S + s;
          if (channel + c < p.channels && n < width) to[(row * p.channels + channel + c) * width + n] = h[c][s];
        }
    };
    auto keep = [&](i64 row) {
#pragma unroll
      for (int c = 0; c < PER; ++c) {
        if (channel + c >= p.channels) continue;
#pragma unroll
        for (int s = 0; s < S; s += S < 4 ? 1 : 4) {
          const int n = lane * S + s;
          const i64 at = kept_at(p.channels, row, channel + c, n) * 4 + n % 4;
          if constexpr (S < 4) put<KEPT_KIND>(p.kept, at, h[c][s]);
          else put4<KEPT_KIND>(p.kept, at, {h[c][s], h[c][s + 1], h[c][s + 2], h[c][s + 3]}, true, 4);
        }
      }
    };
    load(rates, p.A, 0, p.states);
#pragma unroll
    for (int c = 0; c < PER; ++c)
#pragma unroll
      for (int s = 0; s < S; ++s) rates[c][s] *= LOG2E;

    int sequence = -1;
    if constexpr (WHAT == OUTPUTS) {
      if (segment > 0) load(h, p.carry, b * p.segments + segment, N);
      else load(h, PACKED ? nullptr : p.initial, b, p.states);
      if (PACKED && segment > 0) sequence = sequence_at(p, start - 1);
    } else if constexpr (WHAT == STATES) {
      load(h, segment == 0 && !PACKED ? p.initial : nullptr, b, p.states);
    } else {
      load(h, segment == p.segments - 1 && !PACKED ? p.d_final : nullptr, b, p.states);
    }
    float total[PER] = {};  // of the steps
    bool passes = true;     // whether what comes into the segment reaches its other end

    __syncthreads();
    for (int chunk = 0; chunk < count; ++chunk) {
      const int at = first + chunk * TURN;
      const Chunk& now = m.chunks[chunk % 2];
      const float2* steps = &now.steps[0][place(own) * PER];
      float* output = reinterpret_cast<float*>(&m.outputs[chunk % 2][0][lane / 2][place(own)]) + lane % 2 * PER;
      auto read = [&](int i0, Position (&positions)[UNROLL]) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
          const int t = BACK ? STEPS - 1 - i0 - i : i0 + i;
          Position& here = positions[i];
          const float4 v = *reinterpret_cast<const float4*>(&steps[t * CHANNELS]);
          here.dt[0] = v.x, here.v[0] = v.y, here.dt[1] = v.z, here.v[1] = v.w;
#pragma unroll
          for (int w = 0; w < VECTORS; ++w) {
            if (WHAT == STATES && S != 2 && w >= OF_B) continue;
            if (WHAT == GRADIENTS && S != 2 && w < OF_B) continue;
            const float4 f = now.matrices[t][w][lane];
            if constexpr (S == 2) {
              here.B[0] = f.x, here.B[1] = f.y, here.C[0] = f.z, here.C[1] = f.w;
            } else {
              float* to = w < OF_B ? &here.B[w * 4] : &here.C[(w - OF_B) * 4];
              to[0] = f.x, to[1] = f.y, to[2] = f.z, to[3] = f.w;
            }
          }
        }
      };
      auto advance = [&](int i0, const Position (&positions)[UNROLL]) {
        float y[UNROLL][PER];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
          const Position& here = positions[i];
          if (PACKED) {
            const int found = now.starts[BACK ? STEPS - 1 - i0 - i : i0 + i];
            if (found >= 0) {
              if (WHAT == OUTPUTS && sequence >= 0) store(p.final_state, sequence, p.states);
              sequence = found;
              load(h, BACK ? p.d_final : p.initial, sequence, p.states);
              passes = false;
            }
          }
#pragma unroll
          for (int c = 0; c < PER; ++c) {
#pragma unroll
            for (int s = 0; s < S; ++s) {
              const float a = exp2_fast(here.dt[c] * rates[c][s]);
              if constexpr (BACK) {
                h[c][s] = a * fmaf(here.v[c], here.C[s], h[c][s]);
              } else {
                h[c][s] = fmaf(a, h[c][s], here.v[c] * here.B[s]);
                y[i][c] = s ? fmaf(here.C[s], h[c][s], y[i][c]) : here.C[s] * h[c][s];
              }
            }
            total[c] += here.dt[c];
          }
        }
        if constexpr (WHAT == OUTPUTS) {
#pragma unroll
          for (int i = 0; i < UNROLL; ++i) {
            *reinterpret_cast<float2*>(output + (i0 + i) * (LANES / 2) * OWNERS * 4) = make_float2(y[i][0], y[i][1]);
          }
        }
      };
      if (WHAT == OUTPUTS && KEEP && at % KEEP_EVERY == 0)
        keep(b * ((p.length + KEEP_EVERY - 1) / KEEP_EVERY) + at / KEEP_EVERY);
      // Some positions are read while those before them are worked on, and the outputs left when all of these are done.
      // No load passes a store, so that in plain order each position would begin when the one before has ended.
      Position some[UNROLL], others[UNROLL];
      read(0, some);
#pragma unroll 1
      for (int i0 = 0; i0 < STEPS; i0 += 2 * UNROLL) {
        read(i0 + UNROLL, others);
        advance(i0, some);
        if (i0 + 2 * UNROLL < STEPS) read(i0 + 2 * UNROLL, some);
        advance(i0 + UNROLL, others);
      }
      __syncthreads();
    }
    if constexpr (WHAT == OUTPUTS) {
      if (segment == p.segments - 1) store(p.final_state, PACKED ? sequence : b, p.states);
    } else {
      store(p.carry, b * p.segments + segment, N);
#pragma unroll
      for (int c = 0; c < PER; ++c)
        if (lane == 0 && channel + c < p.channels)
          p.span[(b * p.segments + segment) * p.channels + channel + c] = passes ? total[c] : -1.f;
    }
    return;
  }

  // A preparer: four channels, at one position or several.
  const int tid = threadIdx.x - KEEPERS;
  const i64 group = first_channel / (p.channels / p.groups);
  const int item_channel = tid % ACROSS * 4, item_step = tid / ACROSS;
  const i64 c = first_channel + item_channel;
  const int within = (int)least(4, p.channels - c);  // of the four channels; may be negative
  float bias[4], skip[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    bias[k] = HAS_BIAS && k < within ? p.bias[c + k] : 0.f;
    skip[k] = HAS_D && k < within ? p.D[c + k] : 0.f;
  }
  // Within a chunk, and from one to the next, 32 bits do for an offset; the host sees to that.
  const Strides si = BACK ? p.sdy : p.sx;
  const int x_step = (int)si.l, dt_step = (int)p.sdt.l, z_step = (int)p.sz.l, B_step = (int)p.sB.l, C_step = (int)p.sC.l;
  const i64 t0 = first + item_step;
  const X* x_ahead = (const X*)(BACK ? p.dy : p.x) + (b * si.b + c * si.d + t0 * si.l);
  const DT* dt_ahead = (const DT*)p.dt + (b * p.sdt.b + c * p.sdt.d + t0 * p.sdt.l);
  const Z* z_ahead = (const Z*)p.z + (b * p.sz.b + c * p.sz.d + t0 * p.sz.l);
  const BC* B_ahead = (const BC*)p.B + (b * p.sB.b + group * p.sB.d + first * p.sB.l);
  const BC* C_ahead = (const BC*)p.C + (b * p.sC.b + group * p.sC.d + first * p.sC.l);

  // What has been read of the coming chunk, and what the last one's outputs need again.
  Four<DT_KIND> dt[ITEMS] = {};
  Four<X_KIND> x[ITEMS] = {}, x_last[ITEMS] = {};  // x: dy, where gradients are carried
  Four<Z_KIND> z[ITEMS] = {}, z_last[ITEMS] = {};
  Four<BC_KIND> bc[BC_ITEMS] = {};

  auto read = [&](int at) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int q = item_step + i * DOWN;
      if (q >= end - at || q >= STEPS) continue;
      if (WHOLE) {
        if (within > 0) {
          dt[i] = fetch4<DT_KIND>(dt_ahead + i * DOWN * dt_step);
          x[i] = fetch4<X_KIND>(x_ahead + i * DOWN * x_step);
          if (BACK && HAS_Z) z[i] = fetch4<Z_KIND>(z_ahead + i * DOWN * z_step);
        }
      } else {
        dt[i] = fetch4<DT_KIND>(dt_ahead + i * DOWN * dt_step, p.sdt.d, within);
        x[i] = fetch4<X_KIND>(x_ahead + i * DOWN * x_step, si.d, within);
        if (BACK && HAS_Z) z[i] = fetch4<Z_KIND>(z_ahead + i * DOWN * z_step, p.sz.d, within);
      }
    }
#pragma unroll
    for (int i = 0; i < BC_ITEMS; ++i) {
      const int q = tid + i * PREPARERS, j = q % LANES, v = q / LANES % VECTORS, t = q / (LANES * VECTORS);
      bc[i] = {};
      if (q >= STEPS * VECTORS * LANES || t >= end - at) continue;
      const BC *B = B_ahead + t * B_step, *C = C_ahead + t * C_step;
      if (S == 2) {
        const int n = j * S, there = (int)p.states - n;
        if (WHOLE) {
          if (there > 0) bc[i] = fetch2and2<BC_KIND>(B + n, C + n);
        } else {
          BC pairs[4] = {};
          if (there > 0) pairs[0] = B[n], pairs[2] = C[n];
          if (there > 1) pairs[1] = B[n + 1], pairs[3] = C[n + 1];
          bc[i] = fetch4<BC_KIND>(pairs, 1, 4);
        }
      } else {
        const int n = j * S + v % OF_B * 4;
        const BC* from = (v < OF_B ? B : C) + n;
        if (!WHOLE) bc[i] = fetch4<BC_KIND>(from, 1, (int)p.states - n);
        else if (n < (int)p.states) bc[i] = fetch4<BC_KIND>(from);
      }
    }
    x_ahead += TURN * x_step, dt_ahead += TURN * dt_step;
    B_ahead += TURN * B_step, C_ahead += TURN * C_step;
    if (BACK) z_ahead += TURN * z_step;
  };

  auto prepare = [&](int at, Chunk& next) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int q = item_step + i * DOWN;
      // Past the end the item is an old one or zeros; a step of zero, of nothing, leaves the state as it is. A product,
      // since a condition becomes a branch around every softplus.
      const float there = q < end - at ? 1.f : 0.f;
      float step[4], input[4], gate[4];
      widen4<DT_KIND>(dt[i], step);
      widen4<X_KIND>(x[i], input);
      if (BACK && HAS_Z) widen4<Z_KIND>(z[i], gate);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        step[k] = there * step_of(step[k], bias[k]);
        if (!BACK) input[k] *= step[k];
        else input[k] *= HAS_Z ? there * gate[k] * sigmoid(gate[k]) : there;
      }
      if (STEPS % DOWN == 0 || q < STEPS) {
#pragma unroll
        for (int k = 0; k < 4; k += 2)
          *reinterpret_cast<float4*>(&next.steps[q][place((item_channel + k) / PER) * PER]) =
              make_float4(step[k], input[k], step[k + 1], input[k + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < BC_ITEMS; ++i) {
      const int q = tid + i * PREPARERS;
      float f[4];
      widen4<BC_KIND>(bc[i], f);
      if (STEPS * VECTORS * LANES % PREPARERS == 0 || q < STEPS * VECTORS * LANES)
        (&next.matrices[0][0][0])[q] = make_float4(f[0], f[1], f[2], f[3]);
    }
    if (PACKED)
      for (int i = tid; i < STEPS; i += PREPARERS) {
        const int t = at + i;
        int found = -1;
        if (t < end) {
          const int k = sequence_at(p, t);
          if (BACK ? p.offsets[k + 1] == t + 1 : p.offsets[k] == t) found = k;
        }
        next.starts[i] = found;
      }
  };

  // The outputs: x and z once more; where registers allow, ahead of time too.
  constexpr bool EARLY = ITEMS <= 2;
  X* y = (X*)p.y + ((b * p.length + t0) * p.channels + c);
  const X* x_behind = x_ahead;
  const Z* z_behind = z_ahead;
  const bool y_whole = WHOLE || p.channels % 4 == 0;
  auto read_last_item = [&](int i) {
    if (WHOLE) {
      if (within > 0) {
        if (HAS_D) x_last[i] = fetch4<X_KIND>(x_behind + i * DOWN * x_step);
        if (HAS_Z) z_last[i] = fetch4<Z_KIND>(z_behind + i * DOWN * z_step);
      }
    } else {
      if (HAS_D) x_last[i] = fetch4<X_KIND>(x_behind + i * DOWN * x_step, p.sx.d, within);
      if (HAS_Z) z_last[i] = fetch4<Z_KIND>(z_behind + i * DOWN * z_step, p.sz.d, within);
    }
  };
  auto read_last = [&](int at) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int q = item_step + i * DOWN;
      if (q < end - at && q < STEPS) read_last_item(i);
    }
    x_behind += STEPS * x_step;
    z_behind += STEPS * z_step;
  };

  auto finish = [&](int at, const float4 (&outputs)[STEPS][LANES / 2][OWNERS]) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int q = item_step + i * DOWN;
      if (q >= end - at || q >= STEPS) continue;
      if (!EARLY) read_last_item(i);
      float input[4], gate[4], sum[4] = {};
#pragma unroll
      for (int owner = 0; owner < 4 / PER; ++owner)
#pragma unroll
        for (int j = 0; j < LANES / 2; ++j) {
          const float4 f = outputs[q][j][place(item_channel / PER + owner)];
          sum[2 * owner] += f.x + f.z, sum[2 * owner + 1] += f.y + f.w;
        }
      widen4<X_KIND>(x_last[i], input);
      if (HAS_Z) widen4<Z_KIND>(z_last[i], gate);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (HAS_D) sum[k] = fmaf(skip[k], input[k], sum[k]);
        if (HAS_Z) sum[k] *= gate[k] * sigmoid(gate[k]);
      }
      put4<X_KIND>(y, i * DOWN * p.channels, sum, y_whole, within);
    }
    y += STEPS * p.channels;
    if (!EARLY) x_behind += STEPS * x_step, z_behind += STEPS * z_step;
  };

  read(first);
  prepare(first, m.chunks[0]);
  if (count > 1) read(first + TURN);
  __syncthreads();
  // Whatever is read has the time of a whole chunk to arrive.
  for (int chunk = 0; chunk < count; ++chunk) {
    const int at = first + chunk * TURN;
    if (chunk + 1 < count) prepare(at + TURN, m.chunks[(chunk + 1) % 2]);
    if (chunk + 2 < count) read(at + 2 * TURN);
    if (WHAT == OUTPUTS) {
      if (chunk > 0) finish(at - STEPS, m.outputs[(chunk + 1) % 2]);
      if (EARLY) read_last(at);
    }
    __syncthreads();
  }
  if (WHAT == OUTPUTS) finish(first + (count - 1) * STEPS, m.outputs[(count + 1) % 2]);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) outputs(const __grid_constant__ Params p) { scan<OUTPUTS>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) states(const __grid_constant__ Params p) { scan<STATES>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gradients(const __grid_constant__ Params p) { scan<GRADIENTS>(p); }

// From what each segment adds to what comes into each: a thread a state, segment after segment.
template <bool BACK>
__device__ __forceinline__ void pass_on(const Params& p) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, size = p.channels * N;
  if (i >= p.batch * size) return;
  const i64 b = i / size, channel = i % size / N, n = i % N;
  const float rate = n < p.states ? LOG2E * p.A[channel * p.states + n] : 0.f;
  float incoming = 0.f;
  for (i64 k = 0; k < p.segments; ++k) {
    const i64 s = BACK ? p.segments - 1 - k : k;
    const i64 row = b * p.segments + s;
    float* at = p.carry + row * size + i % size;
    float leaving = 0.f;
    if (k + 1 < p.segments) {
      leaving = *at;
      const float span = p.span[row * p.channels + channel];
      if (span >= 0.f) leaving = fmaf(exp2_fast(span * rate), incoming, leaving);  // nothing passes through otherwise
    }
    *at = incoming;
    incoming = leaving;
  }
}

extern "C" __global__ void pass_states(const __grid_constant__ Params p) { pass_on<false>(p); }
extern "C" __global__ void pass_gradients(const __grid_constant__ Params p) { pass_on<true>(p); }
