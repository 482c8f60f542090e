// The selective scan, backward, from the states kept every 32 positions.
//
// A warp holds 16 channels, a thread two of them with four of 16 states; a block, WARPS warps. It takes its segment from
// the end, 32 positions (a chunk) at a time. Forward through the chunk first: the signals are prepared, and the states
// found, of which one is kept in shared memory every 4 positions (a part). Then part by part from the last, forward
// again with all states in registers and back with the gradients. Each warp does all this for its own channels: while
// states go through eight positions it prepares the next eight, and while gradients go through eight it finishes those
// before. Blocks meet for B and C, and for the sums over their channels.
//
// Sums over states (y, and what dx and ddt need) cross threads through shared memory, sums over channels (dB, dC) through
// the tensor cores. N > 16 takes its states 16 at a time (a tile), with sums over states waiting in shared memory.
#include "selective_scan.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int CHANNELS = 16 * WARPS;
constexpr int CHUNK = KEEP_EVERY, PART = 4, PARTS = CHUNK / PART;

using X = Stored<X_KIND>::type;
using DT = Stored<DT_KIND>::type;
using Z = Stored<Z_KIND>::type;
using BC = Stored<BC_KIND>::type;

constexpr int DOWN = 8, ITEMS = CHUNK / DOWN;  // positions that a warp prepares at once, a thread four channels
constexpr int BC_ITEMS = CHUNK * 8 / THREADS;

// The step, and its derivative by dt. For signals of 16 bits the logarithm of the machine does, off by 1e-7: a dozen
// instructions less for each position and channel.
__device__ __forceinline__ float step_and_slope(float dt, float bias, float& slope) {
  if (HAS_BIAS) dt += bias;
  slope = 1.f;
  if (!SOFTPLUS) return dt;
  const float e = exp2_fast(-LOG2E * fabsf(dt)), r = reciprocal(1.f + e);
  slope = dt > 0.f ? r : e * r;
  return X_KIND == FLOAT32 ? softplus(dt) : fmaf(LN2, log2_fast(1.f + e), fmaxf(dt, 0.f));
}

template <int I> struct Index { static constexpr int value = I; };

// On its way from global memory while the chunk, or the tile, before is worked on. Each thread has its own places.
struct Coming {
  Four<X_KIND> x[ITEMS][THREADS], dy[ITEMS][THREADS];
  Four<DT_KIND> dt[ITEMS][THREADS];
  Four<Z_KIND> z[HAS_Z ? ITEMS : 1][HAS_Z ? THREADS : 1];
  Four<BC_KIND> bc[BC_ITEMS][THREADS];
  Four<KEPT_KIND> kept[2][THREADS];
};

struct Shared {
  Coming coming;
  // Rows are longer than they need to be, so that those written together lie in different banks.
  alignas(16) float2 steps[CHUNK][CHANNELS + 2];  // step, step * x; then sums over states: g B, A a g h_{t-1}
  float gated[CHUNK][CHANNELS + 16];        // dy silu(z), the gradient of C h + D x; then C h
  float4 matrices[CHUNK][2][4];             // B, C of a tile
  float4 kept[PARTS][2][THREADS];           // states at the parts' starts
  float4 sums_n[WARPS][3][2][32];           // what is summed over states, for a thread's channels: of 4 positions
  float4 sums_d[WARPS][2][CHUNK][4];        // dB, dC, summed over a warp's channels
  float tiles[TILES > 1 ? 3 : 1][TILES > 1 ? CHUNK : 1][TILES > 1 ? CHANNELS : 1];
  int starts[PACKED ? CHUNK : 1], ends[PACKED ? CHUNK : 1];  // the sequence that does so at a position, or -1
};

// Sums over a warp's channels of numbers times weights, of four states at PART positions, by tensor cores. A quad has
// four pairs of channels, and two of them the same states: the numbers are rows of a matrix (a quad's states), and the
// weights columns (a position's, for even and odd quads), of which a quad looks at its own.
//
// They read 11 bits of a number. Where signals have more than the 8 of bfloat16, numbers go in as two halves, weighted
// before.
struct ChannelSums {
  static constexpr bool HALVES = X_KIND != BFLOAT16 || BC_KIND == FLOAT32;
  // What is cut off a number is, on average, this part of it: of two, or of one where the weights are dy as it came.
  static constexpr float MADE_UP_B = HALVES ? 1.f : 1.000704f, MADE_UP_C = HALVES ? 1.f : HAS_Z ? 1.000704f : 1.000352f;
  float sums[2][4] = {};

  // At position I: numbers by channel and state, a weight for each channel.
  template <int I> __device__ __forceinline__ void add(const float (&v)[2][4], float weight0, float weight1, int quad) {
    const bool mine = quad / 2 == I;
    if constexpr (HALVES) {
#pragma unroll
      for (int s = 0; s < 4; s += 2) {
        float high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float product = v[j / 2][s + j % 2] * (j / 2 ? weight1 : weight0);
          high[j] = __uint_as_float(__float_as_uint(product) & 0xffffe000u);
          low[j] = product - high[j];
        }
        multiply_tf32(sums[s / 2], high, mine ? 1.f : 0.f, mine ? 1.f : 0.f);
        multiply_tf32(sums[s / 2], low, mine ? 1.f : 0.f, mine ? 1.f : 0.f);
      }
    } else {
      const float w0 = mine ? weight0 : 0.f, w1 = mine ? weight1 : 0.f;
#pragma unroll
      for (int s = 0; s < 4; s += 2) {
        const float a[4] = {v[0][s], v[0][s + 1], v[1][s], v[1][s + 1]};
        multiply_tf32(sums[s / 2], a, w0, w1);
      }
    }
  }

  // The four states at position thread % 4. Two quads share them: their sum, in order.
  __device__ __forceinline__ float4 finish(int quad) {
    float v[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      v[s] = quad % 2 ? sums[s / 2][s % 2 * 2 + 1] : sums[s / 2][s % 2 * 2];
      v[s] += __shfl_xor_sync(~0u, v[s], 4);
    }
    return make_float4(v[0], v[1], v[2], v[3]);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char memory[];
  Shared& m = *reinterpret_cast<Shared*>(memory);

  const int tid = threadIdx.x, warp = tid / 32, thread = tid % 32;
  const i64 blocks = (p.channels + CHANNELS - 1) / CHANNELS;
  i64 index = blockIdx.x;
  const i64 block = index % blocks; index /= blocks;
  const i64 segment = index % p.segments, b = index / p.segments;
  const i64 first_channel = block * CHANNELS;
  const int start = (int)(segment * p.segment), end = (int)least(p.length, start + p.segment);
  const i64 chunks = (p.length + CHUNK - 1) / CHUNK, row = b * p.segments + segment;
  const i64 group = first_channel / (p.channels / p.groups);

  // As keeper of states: two neighbouring channels, four states of a tile.
  // The pair goes with the low bits of the thread: a quad is four pairs, as the sums over channels want it.
  const int pair = thread % 8, own = warp * 16 + pair * 2, quarter = thread / 8, quad = thread / 4;
  const i64 channel = first_channel + own;
  float rates[2][4], flow[2][4], d_rates[2][4];
  auto tile_state = [&](int tile, int s) { return (i64)tile * 16 + quarter * 4 + s; };
  auto load = [&](float (&to)[2][4], const float* from, i64 at, i64 width, int tile) {  // (rows, d, width)
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const i64 n = tile_state(tile, s);
        to[c][s] = from && channel + c < p.channels && n < width ? from[(at * p.channels + channel + c) * width + n] : 0.f;
      }
  };
  auto store = [&](float* to, const float (&from)[2][4], i64 at, i64 width, int tile) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const i64 n = tile_state(tile, s);
        if (channel + c < p.channels && n < width) to[(at * p.channels + channel + c) * width + n] = from[c][s];
      }
  };
  auto load_rates = [&](int tile) {
    load(rates, p.A, 0, p.states, tile);
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s) rates[c][s] *= LOG2E;
  };
  auto flow_into_the_end = [&](int tile) {
    if (segment < p.segments - 1) load(flow, p.carry, row, N, tile);
    else load(flow, PACKED ? nullptr : p.d_final, b, p.states, tile);
  };
  if (TILES == 1) {
    load_rates(0);
    flow_into_the_end(0);
    load(d_rates, nullptr, 0, N, 0);
  }

  // As the one who sums over states: two positions of a part, for one channel. For the odd channels of pairs the halves
  // of a part are the other way round, so that they lie in other banks.
  const int half = thread / 16, side = thread % 2, mine = warp * 16 + thread % 16;

  // As preparer: four neighbouring channels of the warp's, every eighth position.
  const int item_channel = warp * 16 + thread % 4 * 4, item_step = thread / 4;
  const i64 c = first_channel + item_channel;
  const int within = (int)least(4, p.channels - c);  // of the four channels; may be negative
  const bool whole = WHOLE || p.channels % 4 == 0;
  float bias[4], skip[4], d_skip[4] = {}, d_bias[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    bias[k] = HAS_BIAS && k < within ? p.bias[c + k] : 0.f;
    skip[k] = HAS_D && k < within ? p.D[c + k] : 0.f;
  }
  // Where this thread's part of a chunk lies in memory: of the chunk before the one that is worked on, which comes next.
  // Within a chunk 32 bits do for an offset; the host sees to that.
  const int x_step = (int)p.sx.l, dt_step = (int)p.sdt.l, z_step = (int)p.sz.l, dy_step = (int)p.sdy.l;
  const int last = start + (end - start - 1) / CHUNK * CHUNK;
  const i64 t0 = last + item_step;
  const X* x_next = (const X*)p.x + (b * p.sx.b + c * p.sx.d + t0 * p.sx.l);
  const X* dy_next = (const X*)p.dy + (b * p.sdy.b + c * p.sdy.d + t0 * p.sdy.l);
  const DT* dt_next = (const DT*)p.dt + (b * p.sdt.b + c * p.sdt.d + t0 * p.sdt.l);
  const Z* z_next = (const Z*)p.z + (b * p.sz.b + c * p.sz.d + t0 * p.sz.l);
  const Four<KEPT_KIND>* kept_next = (const Four<KEPT_KIND>*)p.kept + kept_at(p.channels, b * chunks + last / CHUNK, channel, quarter * 4);
  // Of B and C: four states of one of them, at every (THREADS / 8)th position; and so of the sums for their gradients.
  const bool of_C = tid / 4 % 2;
  const int bc_step = (int)(of_C ? p.sC.l : p.sB.l), bc_state = tid % 4 * 4;
  const BC* bc_next = of_C ? (const BC*)p.C + (b * p.sC.b + group * p.sC.d) : (const BC*)p.B + (b * p.sB.b + group * p.sB.d);
  bc_next += (i64)(last + tid / 8) * bc_step + bc_state;
  float* d_bc = p.d_bc + ((block * p.batch + b) * p.length + last + tid / 8) * 2 * N + tid / 4 % 2 * N + bc_state;
  i64 to = (b * p.length + t0) * p.channels + c, to_z = b * p.sdz.b + t0 * p.sdz.l + c;
  auto step_back = [&] {
    x_next -= CHUNK * x_step, dy_next -= CHUNK * dy_step, dt_next -= CHUNK * dt_step;
    if (HAS_Z) z_next -= CHUNK * z_step;
    kept_next -= (p.channels + 15) / 16 * TILES * 64;
    bc_next -= CHUNK * bc_step;
  };
  auto send_for_item = [&](int at, int i) {  // of the chunk at `at`
    const int count = at + item_step + i * DOWN < end && at >= start ? within : 0;
    copy4<X_KIND, WHOLE>(&m.coming.x[i][tid], x_next + i * DOWN * x_step, p.sx.d, count);
    copy4<X_KIND, WHOLE>(&m.coming.dy[i][tid], dy_next + i * DOWN * dy_step, p.sdy.d, count);
    copy4<DT_KIND, WHOLE>(&m.coming.dt[i][tid], dt_next + i * DOWN * dt_step, p.sdt.d, count);
    if (HAS_Z) copy4<Z_KIND, WHOLE>(&m.coming.z[i][tid], z_next + i * DOWN * z_step, p.sz.d, count);
  };
  auto send_for_tile = [&](int at, int tile) {
#pragma unroll
    for (int i = 0; i < BC_ITEMS; ++i) {
      const int there = at + tid / 8 + i * (THREADS / 8) < end ? (int)p.states - tile * 16 - bc_state : 0;
      copy4<BC_KIND, WHOLE>(&m.coming.bc[i][tid], bc_next + tile * 16 + i * (THREADS / 8) * bc_step, 1, there);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const bool there = channel + k < p.channels && tile * 16 + quarter * 4 < N;
      copy4<KEPT_KIND, true>(&m.coming.kept[k][tid], (const Stored<KEPT_KIND>::type*)(kept_next + tile * 64 + k * 32), 1, there);
    }
  };

  struct Item {
    Four<X_KIND> x, dy;
    Four<DT_KIND> dt;
    Four<Z_KIND> z;
  };
  auto item_of = [&](int i) {
    Item item = {m.coming.x[i][tid], m.coming.dy[i][tid], m.coming.dt[i][tid], {}};
    if (HAS_Z) item.z = m.coming.z[i][tid];
    return item;
  };
  auto prepare = [&](int at, int i) {
    const int q = item_step + i * DOWN;
    const float there = q < end - at ? 1.f : 0.f;  // past the end: a step of zero, of nothing
    const Item item = item_of(i);
    float d[4], u[4], g[4], gate[4];
    widen4<DT_KIND>(item.dt, d);
    widen4<X_KIND>(item.x, u);
    widen4<X_KIND>(item.dy, g);
    if (HAS_Z) widen4<Z_KIND>(item.z, gate);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float slope;
      d[k] = there * step_and_slope(d[k], bias[k], slope);
      u[k] *= d[k];
      if (HAS_Z) g[k] *= gate[k] * sigmoid(gate[k]);
    }
    float4* to = reinterpret_cast<float4*>(&m.steps[q][item_channel]);
    to[0] = make_float4(d[0], u[0], d[1], u[1]);
    to[1] = make_float4(d[2], u[2], d[3], u[3]);
    *reinterpret_cast<float4*>(&m.gated[q][item_channel]) = make_float4(g[0], g[1], g[2], g[3]);
  };
  // What is left to do for an item once its sums over states are there. Of an item past the last, nothing.
  auto finish = [&](int at, int i, const Item& item) {
    const int q = item_step + i % ITEMS * DOWN;
    const bool there = i < ITEMS && at + q < end;
    const float4* sums = reinterpret_cast<const float4*>(&m.steps[q][item_channel]);
    const float4 s0 = sums[0], s1 = sums[1], ys = *reinterpret_cast<const float4*>(&m.gated[q][item_channel]);
    const float in[4] = {s0.x, s0.z, s1.x, s1.z}, out[4] = {s0.y, s0.w, s1.y, s1.w}, y[4] = {ys.x, ys.y, ys.z, ys.w};
    float x[4], dy[4], raw[4], z[4];
    widen4<X_KIND>(item.x, x);
    widen4<X_KIND>(item.dy, dy);
    widen4<DT_KIND>(item.dt, raw);
    if (HAS_Z) widen4<Z_KIND>(item.z, z);
    float dx[4], ddt[4], dz[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float gated = dy[k];
      if (HAS_Z) {
        const float s = sigmoid(z[k]);
        gated *= z[k] * s;
        dz[k] = dy[k] * fmaf(skip[k], x[k], y[k]) * s * fmaf(z[k], 1.f - s, 1.f);
      }
      float slope;
      const float step = step_and_slope(raw[k], bias[k], slope);
      dx[k] = fmaf(step, in[k], skip[k] * gated);
      ddt[k] = fmaf(x[k], in[k], LN2 * out[k]) * slope;
      if (there) d_skip[k] = fmaf(gated, x[k], d_skip[k]), d_bias[k] += ddt[k];
    }
    const i64 at_item = to + i * DOWN * p.channels;
    put4<X_KIND>(p.dx, at_item, dx, whole, there ? within : 0);
    put4<DT_KIND>(p.ddt, at_item, ddt, whole, there ? within : 0);
    if (HAS_Z) put4<Z_KIND>(p.dz, to_z + i * DOWN * p.sdz.l, dz, whole, there ? within : 0);
  };

#pragma unroll
  for (int i = 0; i < ITEMS; ++i) send_for_item(last, i);
  send_for_tile(last, 0);
  for (int at = last; at >= start; at -= CHUNK) {
    await_copies();
    if (PACKED)
      for (int q = tid; q < CHUNK; q += THREADS) {
        const int t = at + q;
        const int k = t < end ? sequence_at(p, t) : 0;
        m.starts[q] = t < end && p.offsets[k] == t ? k : -1;
        m.ends[q] = t < end && p.offsets[k + 1] == t + 1 ? k : -1;
      }

#pragma unroll 1
    for (int tile = 0; tile < TILES; ++tile) {
      if (TILES > 1) {
        if (tile > 0) await_copies();
        load_rates(tile);
        if (at + CHUNK >= end) {
          flow_into_the_end(tile);
          load(d_rates, nullptr, 0, N, tile);
        } else {  // between chunks they wait in global memory, in this block's own places
          load(flow, p.carry, row, N, tile);
          load(d_rates, p.d_rates, row, N, tile);
        }
      }
#pragma unroll
      for (int i = 0; i < BC_ITEMS; ++i) {
        const int q = tid + i * THREADS;
        float f[4];
        widen4<BC_KIND>(m.coming.bc[i][tid], f);
        m.matrices[q / 8][q / 4 % 2][q % 4] = make_float4(f[0], f[1], f[2], f[3]);
      }
      float h[2][4];
      widen4<KEPT_KIND>(m.coming.kept[0][tid], h[0]);
      widen4<KEPT_KIND>(m.coming.kept[1][tid], h[1]);
      __syncthreads();
      if (tile == TILES - 1) step_back();
      if (tile < TILES - 1) send_for_tile(at, tile + 1);
      else if (at > start) send_for_tile(at - CHUNK, 0);

      // States forward, one kept for each part.
      auto decays_at = [&](const float4& v, float (&a)[2][4]) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          a[0][s] = exp2_fast(v.x * rates[0][s]);
          a[1][s] = exp2_fast(v.z * rates[1][s]);
        }
      };
      auto advance = [&](int t, const float4& v, const float4& B, const float (&a)[2][4], float (&before)[2][4]) {
        const float Bs[4] = {B.x, B.y, B.z, B.w};
        if (PACKED && m.starts[t] >= 0) load(h, p.initial, m.starts[t], p.states, tile);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          before[0][s] = h[0][s];
          before[1][s] = h[1][s];
          h[0][s] = fmaf(a[0][s], h[0][s], v.y * Bs[s]);
          h[1][s] = fmaf(a[1][s], h[1][s], v.w * Bs[s]);
        }
      };
      auto steps_at = [&](int t) { return *reinterpret_cast<const float4*>(&m.steps[t][own]); };
      auto sweep = [&](int part) {
        m.kept[part][0][tid] = make_float4(h[0][0], h[0][1], h[0][2], h[0][3]);
        m.kept[part][1][tid] = make_float4(h[1][0], h[1][1], h[1][2], h[1][3]);
        if (part == PARTS - 1) return;
#pragma unroll
        for (int i = 0; i < PART; ++i) {
          const int t = part * PART + i;
          float a[2][4], before[2][4];
          const float4 v = steps_at(t);
          decays_at(v, a);
          advance(t, v, m.matrices[t][0][quarter], a, before);
        }
      };
      if (tile == 0) prepare(at, 0);
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i + 1 < ITEMS; ++i) {
        sweep(2 * i);
        sweep(2 * i + 1);
        if (tile == 0) prepare(at, i + 1);
        __syncwarp();
      }
      sweep(PARTS - 2);
      sweep(PARTS - 1);

      // Over the states: this thread takes one channel at two positions of a part, in whose place it leaves the sums.
      auto read_sums = [&](float2 (&sums)[3]) {
#pragma unroll
        for (int w = HAS_Z ? 0 : 1; w < 3; ++w) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 v = reinterpret_cast<const float2*>(&m.sums_n[warp][w][side][j * 8 + thread % 16 / 2])[half ^ side];
            sums[w] = j ? make_float2(sums[w].x + v.x, sums[w].y + v.y) : v;
          }
        }
      };
      auto leave_sums = [&](int part, float2 (&sums)[3]) {
        const int q = part * PART + half * 2;
        if (TILES > 1) {
#pragma unroll
          for (int w = HAS_Z ? 0 : 1; w < 3; ++w) {
            if (tile > 0) sums[w].x += m.tiles[w][q][mine], sums[w].y += m.tiles[w][q + 1][mine];
            if (tile < TILES - 1) m.tiles[w][q][mine] = sums[w].x, m.tiles[w][q + 1][mine] = sums[w].y;
          }
        }
        if (tile == TILES - 1) {
          if (HAS_Z) m.gated[q][mine] = sums[0].x, m.gated[q + 1][mine] = sums[0].y;
          m.steps[q][mine] = make_float2(sums[1].x, sums[2].x);
          m.steps[q + 1][mine] = make_float2(sums[1].y, sums[2].y);
        }
      };

      // Part by part. A part's sums are read while the one before it is worked on, so that nobody waits for them.
      ChannelSums dB;
      auto go_back = [&](int part, bool first) {
        __syncwarp();
        float2 sums[3];
        read_sums(sums);
        if (const float4 of_B = dB.finish(quad); !first && quad % 2 == 0)
          m.sums_d[warp][0][(part + 1) * PART + thread % 4][quarter] = of_B;
        {
          const float4 v = m.kept[part][0][tid], w = m.kept[part][1][tid];
          h[0][0] = v.x, h[0][1] = v.y, h[0][2] = v.z, h[0][3] = v.w;
          h[1][0] = w.x, h[1][1] = w.y, h[1][2] = w.z, h[1][3] = w.w;
        }
        float a[PART][2][4];
        float before[PART][2][4], y[2][PART];
        float4 steps[PART], B[PART], C[PART];
        float2 gated[PART];
        ChannelSums dC;
        dB = ChannelSums();
        auto forth = [&](auto which) {
          constexpr int i = which.value;
          const int t = part * PART + i;
          steps[i] = steps_at(t), B[i] = m.matrices[t][0][quarter], C[i] = m.matrices[t][1][quarter];
          gated[i] = *reinterpret_cast<const float2*>(&m.gated[t][own]);
          decays_at(steps[i], a[i]);
          advance(t, steps[i], B[i], a[i], before[i]);
          const float Cs[4] = {C[i].x, C[i].y, C[i].z, C[i].w};
          if (HAS_Z)
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
              for (int s = 0; s < 4; ++s) y[k][i] = s ? fmaf(Cs[s], h[k][s], y[k][i]) : Cs[s] * h[k][s];
          dC.add<i>(h, gated[i].x, gated[i].y, quad);
        };
        forth(Index<0>()), forth(Index<1>()), forth(Index<2>()), forth(Index<3>());

        float inflow[2][PART], decay[2][PART];  // sums over the states: of g B, and of rates a g h_{t-1}
        auto back = [&](auto which) {
          constexpr int i = which.value;
          const int t = part * PART + i;
          const float Bs[4] = {B[i].x, B[i].y, B[i].z, B[i].w}, Cs[4] = {C[i].x, C[i].y, C[i].z, C[i].w};
          if (PACKED && m.ends[t] >= 0) load(flow, p.d_final, m.ends[t], p.states, tile);
          float gradients[2][4];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float dt = k ? steps[i].z : steps[i].x, dy = k ? gated[i].y : gated[i].x;
#pragma unroll
            for (int s = 0; s < 4; ++s) {
              const float g = gradients[k][s] = fmaf(Cs[s], dy, flow[k][s]);
              inflow[k][i] = s ? fmaf(g, Bs[s], inflow[k][i]) : g * Bs[s];
              flow[k][s] = a[i][k][s] * g;
              const float w = flow[k][s] * before[i][k][s];
              decay[k][i] = s ? fmaf(rates[k][s], w, decay[k][i]) : rates[k][s] * w;
              d_rates[k][s] = fmaf(dt, w, d_rates[k][s]);
            }
          }
          dB.add<i>(gradients, steps[i].y, steps[i].w, quad);
          if (PACKED && m.starts[t] >= 0 && p.d_initial) store(p.d_initial, flow, m.starts[t], p.states, tile);
        };
        back(Index<3>()), back(Index<2>()), back(Index<1>()), back(Index<0>());
        const float4 of_C = dC.finish(quad);
        __syncwarp();
        auto put_sums = [&](int w, const float (&v)[2][PART]) {
          m.sums_n[warp][w][0][thread] = make_float4(v[0][0], v[0][1], v[0][2], v[0][3]);
          m.sums_n[warp][w][1][thread] = make_float4(v[1][2], v[1][3], v[1][0], v[1][1]);
        };
        if (HAS_Z) put_sums(0, y);
        put_sums(1, inflow);
        put_sums(2, decay);
        if (quad % 2) m.sums_d[warp][1][part * PART + thread % 4][quarter] = of_C;
        if (!first) leave_sums(part + 1, sums);
      };
      Item item = {};  // the one to finish next
#pragma unroll 1
      for (int i = ITEMS - 1; i >= 0; --i) {
        const Item before = item;
        if (tile == TILES - 1) {
          item = item_of(i);
          send_for_item(at - CHUNK, i);
        }
        go_back(2 * i + 1, i == ITEMS - 1);
        __syncwarp();
        if (tile == TILES - 1) finish(at, i + 1, before);
        go_back(2 * i, false);
      }
      __syncwarp();
      float2 sums[3];
      read_sums(sums);
      leave_sums(0, sums);
      if (const float4 of_B = dB.finish(quad); quad % 2 == 0) m.sums_d[warp][0][thread % 4][quarter] = of_B;
      __syncwarp();
      if (tile == TILES - 1) finish(at, 0, item);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < BC_ITEMS; ++i) {  // dB and dC, over the warps: four states of a position
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          const float4 f = m.sums_d[w][of_C][tid / 8 + i * (THREADS / 8)][tid % 4];
          sum.x += f.x, sum.y += f.y, sum.z += f.z, sum.w += f.w;
        }
        if (at + tid / 8 + i * (THREADS / 8) < end && tile * 16 + bc_state < N)
          *reinterpret_cast<float4*>(d_bc + i * (THREADS / 8) * 2 * N + tile * 16) = sum;
      }
      if (TILES > 1 || at == start) {
        if (at > start) store(p.carry, flow, row, N, tile);
        else if (segment == 0 && !PACKED && p.d_initial) store(p.d_initial, flow, b, p.states, tile);
        store(p.d_rates, d_rates, row, N, tile);
      }
    }
    to -= CHUNK * p.channels, to_z -= CHUNK * p.sdz.l;
    d_bc -= CHUNK * 2 * N;
  }

  // Over the threads that finished the same channels.
  __syncthreads();
  float* sums = &m.gated[0][0];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    sums[(item_step * 2 + 0) * CHANNELS + item_channel + k] = d_skip[k];
    sums[(item_step * 2 + 1) * CHANNELS + item_channel + k] = d_bias[k];
  }
  __syncthreads();
  for (int i = tid; i < 2 * CHANNELS; i += THREADS) {
    float sum = 0.f;
    for (int k = 0; k < DOWN; ++k) sum += sums[k * 2 * CHANNELS + i];
    if (first_channel + i % CHANNELS < p.channels)
      (i < CHANNELS ? p.d_skip : p.d_bias)[row * p.channels + first_channel + i % CHANNELS] = sum;
  }
}

// What blocks have left, summed up in order: dB and dC over the blocks of channels of a group, a thread a number in the
// order of (groups, b, l, 2, N); then the gradients of A, D and the bias over rows' segments, a thread a number.
extern "C" __global__ void gather(const __grid_constant__ Params p) {
  const i64 rows = p.batch * p.segments;
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  const i64 size = p.batch * p.length * 2 * N;
  auto sum = [](const float* from, i64 count, i64 apart) {
    float sum = 0.f;
    for (i64 k = 0; k < count; ++k) sum += from[k * apart];
    return sum;
  };
  if (i < size * p.groups) {
    const i64 group = i / size, at = i % size, n = at % N, position = at / (2 * N);
    const bool of_C = at / N % 2;
    const float found = sum(p.d_bc + group * p.blocks * size + at, p.blocks, size);
    if (n < p.states)
      put<BC_KIND>(of_C ? p.dC : p.dB, (position * p.groups + group) * p.states + n,
                   found * (of_C ? ChannelSums::MADE_UP_C : ChannelSums::MADE_UP_B));
    return;
  }
  i -= size * p.groups;
  if (i < p.channels * N) {
    const i64 n = i % N;
    if (n < p.states) p.dA[i / N * p.states + n] = sum(p.d_rates + i, rows, p.channels * N);
    return;
  }
  i -= p.channels * N;
  if (i < p.channels) {
    if (HAS_D) p.dD[i] = sum(p.d_skip + i, rows, p.channels);
  } else if (i < 2 * p.channels) {
    if (HAS_BIAS) p.d_dt_bias[i - p.channels] = sum(p.d_bias + i - p.channels, rows, p.channels);
  }
}
