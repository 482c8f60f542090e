// The selective scan, backward, from the states kept every 32 positions.
//
// A warp holds 16 channels, a thread two of them with four of 16 states; a block, WARPS warps. It takes its segment from
// the end, 32 positions (a chunk) at a time and, within them, 4 (a part): states forward through the chunk, one kept in
// shared memory for each part; then, part by part from the last, forward again with all states in registers and back
// with the gradients. Sums over states (y, and what dx and ddt need) cross threads through shared memory, sums over
// channels (dB, dC) through the tensor cores. N > 16 takes its states 16 at a time (a tile), with sums over states
// waiting in shared memory.
#include "selective_scan.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int CHANNELS = 16 * WARPS;
constexpr int CHUNK = KEEP_EVERY, PART = 4, PARTS = CHUNK / PART;
constexpr int TILES = (N + 15) / 16;

using X = Stored<X_KIND>::type;
using DT = Stored<DT_KIND>::type;
using Z = Stored<Z_KIND>::type;
using BC = Stored<BC_KIND>::type;

constexpr int ACROSS = CHANNELS / 4, DOWN = THREADS / ACROSS, ITEMS = CHUNK / DOWN;  // of four channels, to prepare
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
  Four<FLOAT32> kept[2][THREADS];
};

struct Shared {
  Coming coming;
  float2 steps[CHUNK][CHANNELS];            // step, step * x; then the sums over states of g B and of A a g h_{t-1}
  float gated[CHUNK][CHANNELS];             // dy silu(z), the gradient of C h + D x; then C h
  float4 matrices[CHUNK][2][4];             // B, C of a tile
  float4 kept[PARTS][2][THREADS];           // states at the parts' starts
  float4 sums_n[WARPS][3][2][32];           // what is summed over states, for a thread's channels: of 4 positions
  float4 sums_d[WARPS][CHUNK][2][4];        // dB, dC, summed over a warp's channels
  float tiles[TILES > 1 ? 3 : 1][TILES > 1 ? CHUNK : 1][TILES > 1 ? CHANNELS : 1];
  int starts[PACKED ? CHUNK : 1], ends[PACKED ? CHUNK : 1];  // the sequence that does so at a position, or -1
};

// Sums over the threads of each quad of four numbers a thread, for PART positions, by tensor cores: the numbers are two
// rows of a matrix in two halves of four columns, which a product with ones adds up. They read ten bits of mantissa,
// enough for gradients that end in 16 bits; a float32 goes in as two such numbers.
struct QuadSums {
  float sums[4] = {0.f, 0.f, 0.f, 0.f};  // of the numbers 0, 2, 1, 3 at position thread % 4

  template <int I> __device__ __forceinline__ void add(const float (&v)[4], int quad) {
    if constexpr (BC_KIND == FLOAT32 || X_KIND == FLOAT32) {
      float high[4], low[4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        high[s] = __uint_as_float(__float_as_uint(v[s]) & 0xffffe000u);
        low[s] = v[s] - high[s];
      }
      multiply<I>(high, quad);
      multiply<I>(low, quad);
    } else {
      multiply<I>(v, quad);
    }
  }

  template <int I> __device__ __forceinline__ void multiply(const float (&v)[4], int quad) {
    const float even = quad == 2 * I ? 1.f : 0.f, odd = quad == 2 * I + 1 ? 1.f : 0.f;  // of the columns
    multiply_tf32(sums, v, even, odd);
  }

  // Two quads share four states: their sum, in order.
  __device__ __forceinline__ float4 finish() {
#pragma unroll
    for (int s = 0; s < 4; ++s) sums[s] += __shfl_xor_sync(~0u, sums[s], 4);
    return make_float4(sums[0], sums[2], sums[1], sums[3]);
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

  // As the one who sums over states: two positions of a part, for one channel.
  const int half = thread % 2, side = thread / 16, mine = warp * 16 + thread % 16 / 2 * 2 + side;

  // As preparer: four neighbouring channels, every (THREADS / (CHANNELS / 4))th position.
  const int item_channel = tid % ACROSS * 4, item_step = tid / ACROSS;
  const i64 c = first_channel + item_channel;
  const int within = (int)least(4, p.channels - c);  // of the four channels; may be negative
  const bool whole = p.channels % 4 == 0;
  float bias[4], skip[4], d_skip[4] = {}, d_bias[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    bias[k] = HAS_BIAS && k < within ? p.bias[c + k] : 0.f;
    skip[k] = HAS_D && k < within ? p.D[c + k] : 0.f;
  }
  // Within a chunk 32 bits do for an offset; the host sees to that.
  const int x_step = (int)p.sx.l, dt_step = (int)p.sdt.l, z_step = (int)p.sz.l, dy_step = (int)p.sdy.l;
  struct Item {
    Four<X_KIND> x, dy;
    Four<DT_KIND> dt;
    Four<Z_KIND> z;
  };
  // Position item_step + i * DOWN of the chunk, for which `take` gets the four pointers and how many channels there are.
  auto item_at = [&](int at, int i, auto take) {
    const i64 t = at + item_step;
    take((const X*)p.x + (b * p.sx.b + c * p.sx.d + t * p.sx.l) + i * DOWN * x_step,
         (const X*)p.dy + (b * p.sdy.b + c * p.sdy.d + t * p.sdy.l) + i * DOWN * dy_step,
         (const DT*)p.dt + (b * p.sdt.b + c * p.sdt.d + t * p.sdt.l) + i * DOWN * dt_step,
         (const Z*)p.z + (b * p.sz.b + c * p.sz.d + t * p.sz.l) + i * DOWN * z_step, t + i * DOWN < end ? within : 0);
  };
  auto send_for_signals = [&](int at) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      item_at(at, i, [&](const X* x, const X* dy, const DT* dt, const Z* z, int count) {
        copy4<X_KIND, WHOLE>(&m.coming.x[i][tid], x, p.sx.d, count);
        copy4<X_KIND, WHOLE>(&m.coming.dy[i][tid], dy, p.sdy.d, count);
        copy4<DT_KIND, WHOLE>(&m.coming.dt[i][tid], dt, p.sdt.d, count);
        if (HAS_Z) copy4<Z_KIND, WHOLE>(&m.coming.z[i][tid], z, p.sz.d, count);
      });
  };
  auto send_for_tile = [&](int at, int tile) {
#pragma unroll
    for (int i = 0; i < BC_ITEMS; ++i) {
      const int q = tid + i * THREADS, n = tile * 16 + q % 4 * 4;
      const i64 t = at + q / 8;
      const BC* from = q / 4 % 2 ? (const BC*)p.C + (b * p.sC.b + t * p.sC.l + group * p.sC.d + n)
                                 : (const BC*)p.B + (b * p.sB.b + t * p.sB.l + group * p.sB.d + n);
      copy4<BC_KIND, WHOLE>(&m.coming.bc[i][tid], from, 1, t < end ? (int)p.states - n : 0);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float* from = p.kept + ((b * chunks + at / CHUNK) * p.channels + channel + k) * N + tile_state(tile, 0);
      const bool there = channel + k < p.channels && tile_state(tile, 0) < N;
      copy4<FLOAT32, true>(&m.coming.kept[k][tid], from, 1, there);
    }
  };

  const int last = start + (end - start - 1) / CHUNK * CHUNK;
  send_for_signals(last);
  send_for_tile(last, 0);
  for (int at = last; at >= start; at -= CHUNK) {
    await_copies();
    {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        const int q = item_step + i * DOWN;
        const float there = q < end - at ? 1.f : 0.f;  // past the end: a step of zero, of nothing
        float d[4], u[4], g[4], gate[4];
        widen4<DT_KIND>(m.coming.dt[i][tid], d);
        widen4<X_KIND>(m.coming.x[i][tid], u);
        widen4<X_KIND>(m.coming.dy[i][tid], g);
        if (HAS_Z) widen4<Z_KIND>(m.coming.z[i][tid], gate);
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
      }
      if (PACKED)
        for (int q = tid; q < CHUNK; q += THREADS) {
          const int t = at + q;
          const int k = t < end ? sequence_at(p, t) : 0;
          m.starts[q] = t < end && p.offsets[k] == t ? k : -1;
          m.ends[q] = t < end && p.offsets[k + 1] == t + 1 ? k : -1;
        }
    }

    Item items[ITEMS] = {};
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
      widen4<FLOAT32>(m.coming.kept[0][tid], h[0]);
      widen4<FLOAT32>(m.coming.kept[1][tid], h[1]);
      __syncthreads();
      if (tile < TILES - 1) {
        send_for_tile(at, tile + 1);
      } else if (at > start) {
        send_for_tile(at - CHUNK, 0);
        send_for_signals(at - CHUNK);
      }

      // States forward, one kept for each part.
      auto advance = [&](int t, const float4& v, const float4& B, float (&a)[2][4], float (&before)[2][4]) {
        const float Bs[4] = {B.x, B.y, B.z, B.w};
        if (PACKED && m.starts[t] >= 0) load(h, p.initial, m.starts[t], p.states, tile);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          before[0][s] = h[0][s];
          before[1][s] = h[1][s];
          a[0][s] = exp2_fast(v.x * rates[0][s]);
          a[1][s] = exp2_fast(v.z * rates[1][s]);
          h[0][s] = fmaf(a[0][s], h[0][s], v.y * Bs[s]);
          h[1][s] = fmaf(a[1][s], h[1][s], v.w * Bs[s]);
        }
      };
      auto steps_at = [&](int t) { return *reinterpret_cast<const float4*>(&m.steps[t][own]); };
#pragma unroll 1
      for (int part = 0; part < PARTS; ++part) {
        m.kept[part][0][tid] = make_float4(h[0][0], h[0][1], h[0][2], h[0][3]);
        m.kept[part][1][tid] = make_float4(h[1][0], h[1][1], h[1][2], h[1][3]);
        if (part == PARTS - 1) break;
#pragma unroll
        for (int i = 0; i < PART; ++i) {
          const int t = part * PART + i;
          float a[2][4], before[2][4];
          advance(t, steps_at(t), m.matrices[t][0][quarter], a, before);
        }
      }

#pragma unroll 1
      for (int part = PARTS - 1; part >= 0; --part) {
        {
          const float4 v = m.kept[part][0][tid], w = m.kept[part][1][tid];
          h[0][0] = v.x, h[0][1] = v.y, h[0][2] = v.z, h[0][3] = v.w;
          h[1][0] = w.x, h[1][1] = w.y, h[1][2] = w.z, h[1][3] = w.w;
        }
        float a[PART][2][4], before[PART][2][4], y[2][PART];
        float4 steps[PART], B[PART], C[PART];
        float2 gated[PART];
        QuadSums dB, dC;
        auto forth = [&](auto which) {
          constexpr int i = which.value;
          const int t = part * PART + i;
          steps[i] = steps_at(t), B[i] = m.matrices[t][0][quarter], C[i] = m.matrices[t][1][quarter];
          gated[i] = *reinterpret_cast<const float2*>(&m.gated[t][own]);
          advance(t, steps[i], B[i], a[i], before[i]);
          const float Cs[4] = {C[i].x, C[i].y, C[i].z, C[i].w};
          float d[4];
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            d[s] = fmaf(gated[i].y, h[1][s], gated[i].x * h[0][s]);
#pragma unroll
            for (int k = 0; k < 2; ++k) y[k][i] = s ? fmaf(Cs[s], h[k][s], y[k][i]) : Cs[s] * h[k][s];
          }
          dC.add<i>(d, quad);
        };
        forth(Index<0>()), forth(Index<1>()), forth(Index<2>()), forth(Index<3>());

        float inflow[2][PART], decay[2][PART];  // sums over the states: of g B, and of rates a g h_{t-1}
        auto back = [&](auto which) {
          constexpr int i = which.value;
          const int t = part * PART + i;
          const float Bs[4] = {B[i].x, B[i].y, B[i].z, B[i].w}, Cs[4] = {C[i].x, C[i].y, C[i].z, C[i].w};
          if (PACKED && m.ends[t] >= 0) load(flow, p.d_final, m.ends[t], p.states, tile);
          float d[4];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float dt = k ? steps[i].z : steps[i].x, u = k ? steps[i].w : steps[i].y;
            const float dy = k ? gated[i].y : gated[i].x;
#pragma unroll
            for (int s = 0; s < 4; ++s) {
              const float g = fmaf(Cs[s], dy, flow[k][s]);
              d[s] = k ? fmaf(u, g, d[s]) : u * g;
              inflow[k][i] = s ? fmaf(g, Bs[s], inflow[k][i]) : g * Bs[s];
              flow[k][s] = a[i][k][s] * g;
              const float w = flow[k][s] * before[i][k][s];
              decay[k][i] = s ? fmaf(rates[k][s], w, decay[k][i]) : rates[k][s] * w;
              d_rates[k][s] = fmaf(dt, w, d_rates[k][s]);
            }
          }
          dB.add<i>(d, quad);
          if (PACKED && m.starts[t] >= 0 && p.d_initial) store(p.d_initial, flow, m.starts[t], p.states, tile);
        };
        back(Index<3>()), back(Index<2>()), back(Index<1>()), back(Index<0>());
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          m.sums_n[warp][0][k][thread] = make_float4(y[k][0], y[k][1], y[k][2], y[k][3]);
          m.sums_n[warp][1][k][thread] = make_float4(inflow[k][0], inflow[k][1], inflow[k][2], inflow[k][3]);
          m.sums_n[warp][2][k][thread] = make_float4(decay[k][0], decay[k][1], decay[k][2], decay[k][3]);
        }
        const float4 of_B = dB.finish(), of_C = dC.finish();
        m.sums_d[warp][part * PART + thread % 4][quad % 2][quarter] = quad % 2 ? of_C : of_B;
        __syncwarp();

        {  // Over the states: this thread takes one channel at two positions, in whose place it leaves the sums.
          float2 sums[3];
#pragma unroll
          for (int w = 0; w < 3; ++w) {
            sums[w] = make_float2(0.f, 0.f);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float2 v = reinterpret_cast<const float2*>(&m.sums_n[warp][w][side][j * 8 + thread % 16 / 2])[half];
              sums[w].x += v.x, sums[w].y += v.y;
            }
          }
          const int q = part * PART + half * 2;
          if (TILES > 1) {
#pragma unroll
            for (int w = 0; w < 3; ++w) {
              if (tile > 0) sums[w].x += m.tiles[w][q][mine], sums[w].y += m.tiles[w][q + 1][mine];
              if (tile < TILES - 1) m.tiles[w][q][mine] = sums[w].x, m.tiles[w][q + 1][mine] = sums[w].y;
            }
          }
          if (tile == TILES - 1) {
            m.gated[q][mine] = sums[0].x, m.gated[q + 1][mine] = sums[0].y;
            m.steps[q][mine] = make_float2(sums[1].x, sums[2].x);
            m.steps[q + 1][mine] = make_float2(sums[1].y, sums[2].y);
          }
        }
        __syncwarp();
      }
      __syncthreads();
      // What is left to do for each position needs the signals again, now from the cache.
      if (tile == TILES - 1)
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
          item_at(at, i, [&](const X* x, const X* dy, const DT* dt, const Z* z, int count) {
            if (WHOLE && count <= 0) return;
            items[i].x = WHOLE ? fetch4<X_KIND>(x) : fetch4<X_KIND>(x, p.sx.d, count);
            items[i].dy = WHOLE ? fetch4<X_KIND>(dy) : fetch4<X_KIND>(dy, p.sdy.d, count);
            items[i].dt = WHOLE ? fetch4<DT_KIND>(dt) : fetch4<DT_KIND>(dt, p.sdt.d, count);
            if (HAS_Z) items[i].z = WHOLE ? fetch4<Z_KIND>(z) : fetch4<Z_KIND>(z, p.sz.d, count);
          });
      for (int v = tid; v < CHUNK * 8; v += THREADS) {  // dB and dC, over the warps: four states of a position
        const int q = v / 8, n = tile * 16 + v % 4 * 4;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          const float4 f = (&m.sums_d[w][0][0][0])[v];
          sum.x += f.x, sum.y += f.y, sum.z += f.z, sum.w += f.w;
        }
        if (q < end - at && n < N)
          *reinterpret_cast<float4*>(p.d_bc + ((block * p.batch + b) * p.length + at + q) * 2 * N + v / 4 % 2 * N + n) = sum;
      }
      if (TILES > 1 || at == start) {
        if (at > start) store(p.carry, flow, row, N, tile);
        else if (segment == 0 && !PACKED && p.d_initial) store(p.d_initial, flow, b, p.states, tile);
        store(p.d_rates, d_rates, row, N, tile);
      }
    }

#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int q = item_step + i * DOWN;
      if (q >= end - at) continue;
      const float4* sums = reinterpret_cast<const float4*>(&m.steps[q][item_channel]);
      const float4 s0 = sums[0], s1 = sums[1], ys = *reinterpret_cast<const float4*>(&m.gated[q][item_channel]);
      const float in[4] = {s0.x, s0.z, s1.x, s1.z}, out[4] = {s0.y, s0.w, s1.y, s1.w}, y[4] = {ys.x, ys.y, ys.z, ys.w};
      float x[4], dy[4], raw[4], z[4];
      widen4<X_KIND>(items[i].x, x);
      widen4<X_KIND>(items[i].dy, dy);
      widen4<DT_KIND>(items[i].dt, raw);
      if (HAS_Z) widen4<Z_KIND>(items[i].z, z);
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
        d_skip[k] = fmaf(gated, x[k], d_skip[k]);
        d_bias[k] += ddt[k];
      }
      const i64 to = (b * p.length + at + q) * p.channels + c;
      put4<X_KIND>(p.dx, to, dx, whole, within);
      put4<DT_KIND>(p.ddt, to, ddt, whole, within);
      if (HAS_Z) put4<Z_KIND>(p.dz, to, dz, whole, within);
    }
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


// dB and dC: over the blocks of channels of a group. A thread a number, in the order of (groups, b, l, 2, N).
struct Parts {
  const float* parts;
  void *dB, *dC;
  i64 batch, length, groups, blocks, states;
};

extern "C" __global__ void gather(const __grid_constant__ Parts p) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  const i64 size = p.batch * p.length * 2 * N;
  if (i >= size * p.groups) return;
  const i64 group = i / size, at = i % size, n = at % N, position = at / (2 * N);
  float sum = 0.f;
  for (i64 k = 0; k < p.blocks; ++k) sum += p.parts[(group * p.blocks + k) * size + at];
  if (n < p.states) put<BC_KIND>(at / N % 2 ? p.dC : p.dB, (position * p.groups + group) * p.states + n, sum);
}
