// SSD, backward: a chunk, from the state before it and the gradient of the state after it.
//
// A block takes a chunk through tiles of the heads of a group, all of them or a part, so that what B and C get from all
// heads is added up in the sums of its products. One warpgroup has the gradients of inputs (x, B and, through the scores,
// dt), its matrices between positions being (s, t); the other those of outputs (C, and dt through the state before), and
// as the first has twice as much to do, it also copies, and takes to memory what the first has left of the tile before.
// For a tile, with weights as in ssd_forward.cu,
//
//   K = L ∘ (x dy^T), S = L ∘ (B C^T)                      (s, t)
//   du = w ∘ (B F^T) + S dy,  dx = step du + D dy          (s, p)     F: the gradient of the state after the chunk
//   dB += (w step x) F,  dS += step K                      (s, n), (s, t)
//   dC += (v dy) h                                         (t, n)     h: the state before the chunk, v: decays since
//
// and in the end dB += dS C, dC += dS^T B. All but K is a sum over states: where there are more than N, slices of N are taken
// one after the other. The first has all of S and leaves dS; one after it (LATER) adds to dx what its states give.
#include "ssd.cuh"

struct Stage {  // what comes from memory for a tile
  Matrix<CHUNK, TILE> x, dy;
  Matrix<TILE, N> before, flow;
  Decays decays;
};

struct Shared {
  Stage stages[2];
  Matrix<CHUNK, N> B, C;
  Matrix<CHUNK, TILE> leaving;    // dx, of earlier slices at first; in the end dS
  float4 scores[CHUNK / 8][GROUP];  // each thread of the first warpgroup has its own
  float columns[4][CHUNK];        // sums over a warp's rows
  float rows[CHUNK];              // and over columns
  float warps[2][4];              // what is summed over the second warpgroup's warps
};

constexpr int DELIVERED = 3;  // the barrier at which the second warpgroup has taken a tile's dx and sums from the first

enum Sum { ENDING, PASSING, ENTERING, DIRECT };  // as in ssd_steps.cu

__device__ __forceinline__ float sum_of_quad(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int k = 1; k < 32; k *= 2) v += __shfl_xor_sync(~0u, v, k);
  return v;
}

__device__ __forceinline__ float sum_of_four(const float (&v)[4]) { return (v[0] + v[1]) + (v[2] + v[3]); }

// The product of two fragments' numbers, added up.
__device__ __forceinline__ float dot(const float* a, unsigned b) { return a[0] * low_half(b) + a[1] * high_half(b); }
__device__ __forceinline__ float dot(unsigned a, unsigned b) {
  return low_half(a) * low_half(b) + high_half(a) * high_half(b);
}

struct Block {  // its work
  int thread, group, lane, warp, r, c;  // of this thread; its rows of sums are r and r + 8, its columns c and c + 1 of eight
  int heads, split, of_groups, first, count;
  i64 chunk, row;
  Place at;

  __device__ __forceinline__ explicit Block(const Params& p) {
    thread = threadIdx.x % GROUP, group = this_group(), lane = thread % 32, warp = thread / 32;
    r = 16 * warp + lane / 4, c = 2 * (lane % 4);
    heads = (int)(p.heads / p.groups);
    split = blockIdx.x % (int)p.splits, of_groups = blockIdx.x / (int)p.splits % (int)p.groups;
    chunk = blockIdx.x / (int)p.splits / (int)p.groups, row = PACKED ? 0 : chunk / p.chunks;
    const int of_row = (int)(chunk - row * p.chunks);
    at = place_of(p, of_row, PACKED ? sequence_of(p, of_row, CHUNK) : 0);
    const int each = (heads + (int)p.splits - 1) / (int)p.splits;
    first = split * each * PARTS, count = least(each, heads - split * each) * PARTS;
  }
  __device__ __forceinline__ int head(int tile) const { return of_groups * heads + tile / PARTS; }
  __device__ __forceinline__ int channel(int tile) const { return tile % PARTS * TILE; }
  __device__ __forceinline__ i64 index(const Params& p, int tile) const {
    return (chunk * p.heads + head(tile)) * PARTS + tile % PARTS;
  }
  __device__ __forceinline__ i64 in_slices(const Params& p, i64 index) const {
    return p.slice * p.batch * p.chunks * p.heads * PARTS + index;
  }
};

// Of what the tiles want, by the second warpgroup, which has less to do; in a LATER slice by both, since the first has not
// much more.
template <bool LATER> struct Copies {
  static constexpr int THREADS = LATER ? 2 * GROUP : GROUP;
  const bool mine;
  const int thread;
  Rows<THREADS, TILE> x, dy;
  Rows<THREADS, N> before, flow;

  __device__ __forceinline__ Copies(const Params& p, const Block& b)
      : mine(LATER || b.group == 1), thread(threadIdx.x % THREADS),
        x(p.x + b.row * p.sx.b + b.at.start * p.sx.l, p.sx.l, thread),
        dy(p.dy + b.row * p.sdy.b + b.at.start * p.sdy.l, p.sdy.l, thread),
        before(p.states, N, thread), flow(p.flows, N, thread) {}

  __device__ __forceinline__ void start(const Params& p, const Block& b, int tile, Stage& to) const {
    const int head = b.head(tile), channel = b.channel(tile);
    const i64 state = b.index(p, tile) * TILE * N;
    x.copy(to.x.v, head * p.sx.h + channel, b.at.count());
    dy.copy(to.dy.v, head * p.sdy.h + channel, b.at.count());
    before.copy(to.before.v, state, TILE);
    flow.copy(to.flow.v, state, TILE);
    if (thread < DECAYS_PIECES) copy_piece(to.decays, p.decays[b.chunk * p.heads + head], thread);
    commit_copies();
  }
};

// The tiles one after the other, each while the next one is on its way.
template <bool COPYING, bool LATER, class Function>
__device__ __forceinline__ void each_tile(
    const Params& p, const Block& b, const Copies<LATER>& copies, Shared& m, Function function) {
  for (int i = 0; i < b.count; ++i) {
    if (i > 0) {
      if (COPYING) await_copies_but<0>(), publish();
      __syncthreads();
    }
    if (COPYING && i + 1 < b.count) copies.start(p, b, b.first + i + 1, m.stages[(i + 1) % 2]);
    function(b.first + i, m.stages[i % 2]);
  }
}

__device__ __forceinline__ void keep_sums(
    const Params& p, const Block& b, const float (&sums)[N / 2], float* partial, bfloat16* narrow, const Strides& strides) {
#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const int t = b.r + i / 2 % 2 * 8;
    if (t >= b.at.count()) continue;
    const int state = i / 4 * 8 + b.c;
    if (partial) {
      const i64 row = (b.split * p.batch + b.row) * p.length + b.at.start + t;
      *reinterpret_cast<float2*>(partial + (row * p.groups + b.of_groups) * N + state) = make_float2(sums[i], sums[i + 1]);
    } else {
      const i64 to = b.row * strides.b + (b.at.start + t) * strides.l + b.of_groups * strides.h + state;
      *reinterpret_cast<unsigned*>(narrow + to) = to_bfloats(sums[i], sums[i + 1]);
    }
  }
}

template <bool LATER>
__device__ __forceinline__ void of_inputs(const Params& p, const Block& b, const Copies<LATER>& copies, Shared& m) {
  const int thread = b.thread, lane = b.lane, warp = b.warp, r = b.r, c = b.c;
  float d_B[N / 2], between[CHUNK / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d_B[i] = 0.f;
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) between[i] = 0.f;
  bfloat16* const rows_dx = p.dx + b.row * p.sdx.b + b.at.start * p.sdx.l;
  const Rows<GROUP, TILE> earlier(rows_dx, p.sdx.l, thread);
  each_tile<LATER>(p, b, copies, m, [&](int tile, Stage& now) {
    const Decays& decays = now.decays;
    const int head = b.head(tile);
    if (LATER) {
      await_barrier(DELIVERED, 2 * GROUP);
      earlier.copy(m.leaving.v, head * p.sdx.h + b.channel(tile), b.at.count());
      commit_copies();
    }
    const i64 index = b.in_slices(p, b.index(p, tile));
    float* to_sums = p.sums + index * (4 * CHUNK);
    float d_scores[CHUNK / 2], d_u[TILE / 2];
    begin_products();
    if constexpr (!LATER) {
#pragma unroll
      for (int k = 0; k < TILE / 16; ++k)
        multiply<false, false>(d_scores, by_rows(now.x, 16 * k), by_rows(now.dy, 16 * k), k > 0);
      commit_products();
    }
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
      multiply<false, false>(d_u, by_rows(m.B, 16 * k), by_rows(now.flow, 16 * k), k > 0);
    commit_products();
    unsigned x[TILE / 16][4], inflow[TILE / 16][4];
    const float until[2] = {decays.until[r], decays.until[r + 8]};
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
      fetch(x[k], now.x, 16 * warp, 16 * k);
#pragma unroll
      for (int i = 0; i < 4; ++i) inflow[k][i] = scaled(x[k][i], until[i % 2], until[i % 2]);
    }
    hold(d_B);
    begin_products();
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) multiply<true>(d_B, inflow[k], by_columns(now.flow, 16 * k), 1);
    commit_products();

    const float log[2] = {decays.log[r], decays.log[r + 8]}, step[2] = {decays.step[r], decays.step[r + 8]};
    const float last = decays.log[CHUNK - 1];
    float direct[2] = {}, beginning[2] = {};
    unsigned kept[CHUNK / 16][4];
    // A pair's flow is through the decays after s, up to t. What begins at s is taken away where s is passed.
    auto take_pairs = [&] {
      float ending[CHUNK / 8][2];
#pragma unroll
      for (int j = 0; j < CHUNK / 8; ++j) {
        const int t = 8 * j + c;
        const float2 after = *reinterpret_cast<const float2*>(decays.log + t);
        const float4 own = m.scores[j][thread];
        const float scores[4] = {own.x, own.y, own.z, own.w};
        ending[j][0] = ending[j][1] = 0.f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int s = r + 8 * i;
          const float low = exp2_fast(s <= t ? after.x - log[i] : NOTHING);
          const float high = exp2_fast(s <= t + 1 ? after.y - log[i] : NOTHING);
          const float* d = d_scores + 4 * j + 2 * i;
          between[4 * j + 2 * i] = fmaf(d[0] * low, step[i], between[4 * j + 2 * i]);
          between[4 * j + 2 * i + 1] = fmaf(d[1] * high, step[i], between[4 * j + 2 * i + 1]);
          const float kept_low = scores[2 * i] * low, kept_high = scores[2 * i + 1] * high;
          kept[j / 2][j % 2 * 2 + i] = to_bfloats(kept_low, kept_high);
          const float flow[2] = {d[0] * kept_low, d[1] * kept_high};
          direct[i] += flow[0] + flow[1];
          const float passing[2] = {s < t ? flow[0] : 0.f, s < t + 1 ? flow[1] : 0.f};
          beginning[i] += passing[0] + passing[1];
          ending[j][0] = fmaf(passing[0], step[i], ending[j][0]);
          ending[j][1] = fmaf(passing[1], step[i], ending[j][1]);
        }
      }
      // Over the eight threads of a column; each ends with the columns of one block of eight.
#pragma unroll
      for (int half = 4; half > 0; half /= 2) {
        const bool upper = lane / 4 & half;
#pragma unroll
        for (int j = 0; j < half; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float give = upper ? ending[j][i] : ending[j + half][i];
            const float own = upper ? ending[j + half][i] : ending[j][i];
            ending[j][i] = own + __shfl_xor_sync(~0u, give, 4 * half);
          }
      }
      await_barrier(DELIVERED, 2 * GROUP);
      *reinterpret_cast<float2*>(&m.columns[warp][8 * (lane / 4) + c]) = make_float2(ending[0][0], ending[0][1]);
    };
    if constexpr (!LATER) {
      await_products<2>();
      hold(d_scores);
      take_pairs();
    }

    await_products<1>();
    hold(d_u);
    float through[2] = {};
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* u = d_u + 4 * j + 2 * i;
        const float to_end = exp2_fast(last - log[i]);
        u[0] *= to_end, u[1] *= to_end;
        through[i] += dot(u, x[j / 2][j % 2 * 2 + i]);
      }
    hold(d_u);
    if constexpr (!LATER) {
      begin_products();
#pragma unroll
      for (int k = 0; k < CHUNK / 16; ++k) multiply<true>(d_u, kept[k], by_columns(now.dy, 16 * k), 1);
      commit_products();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      direct[i] = sum_of_quad(direct[i]), beginning[i] = sum_of_quad(beginning[i]), through[i] = sum_of_quad(through[i]);
      if (lane % 4 == 0) {
        to_sums[ENTERING * CHUNK + r + 8 * i] = through[i] * step[i];
        to_sums[DIRECT * CHUNK + r + 8 * i] = direct[i] + through[i];
        m.rows[r + 8 * i] = beginning[i] * step[i];
      }
    }
    await_products<0>();
    hold(d_u);
    hold(d_B);
    const float skip = !LATER && p.D ? p.D[head * p.D_h] : 0.f;
    if (LATER) {
      await_copies_but<0>();
      sync_group(0);
    }
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
      unsigned dy[4], a[4], before[4];
      fetch(dy, now.dy, 16 * warp, 16 * k);
      if (LATER) fetch(before, m.leaving, 16 * warp, 16 * k);  // what this thread puts there
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* u = d_u + 8 * k + 2 * i;
        float low = u[0] * step[i % 2], high = u[1] * step[i % 2];
        if (LATER) low += low_half(before[i]), high += high_half(before[i]);
        a[i] = to_bfloats(fmaf(skip, low_half(dy[i]), low), fmaf(skip, high_half(dy[i]), high));
      }
      put(m.leaving, 16 * warp, 16 * k, a);
    }
  });

  unsigned a[CHUNK / 16][4];
  uint4* const to_slices = p.between + blockIdx.x * (CHUNK / 16 * GROUP) + thread;
  __syncthreads();
  await_barrier(DELIVERED, 2 * GROUP);
#pragma unroll
  for (int k = 0; k < CHUNK / 16; ++k) {
    if (LATER) {
      const uint4 v = to_slices[k * GROUP];
      a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
    } else {
      as_fragments(a[k], between, k);
      if (p.slices > 1) to_slices[k * GROUP] = make_uint4(a[k][0], a[k][1], a[k][2], a[k][3]);
    }
    put(m.leaving, 16 * warp, 16 * k, a[k]);
  }
  publish();
  __syncthreads();
  hold(d_B);
  begin_products();
#pragma unroll
  for (int k = 0; k < CHUNK / 16; ++k) multiply<true>(d_B, a[k], by_columns(m.C, 16 * k), 1);
  commit_products();
  await_products<0>();
  hold(d_B);
  keep_sums(p, b, d_B, p.partial_B, p.dB, p.sdB);
}

template <bool LATER>
__device__ __forceinline__ void of_outputs(const Params& p, const Block& b, const Copies<LATER>& copies, Shared& m) {
  const int thread = b.thread, lane = b.lane, warp = b.warp, r = b.r;
  bfloat16* const rows_dx = p.dx + b.row * p.sdx.b + b.at.start * p.sdx.l;
  auto deliver = [&](int tile) {  // what the first warpgroup has left of it
    if (tile >= b.first) {
      bfloat16* to = rows_dx + b.head(tile) * p.sdx.h + b.channel(tile);
#pragma unroll
      for (int s = thread / 8; s < CHUNK; s += GROUP / 8)
        if (s < b.at.count())
          *reinterpret_cast<uint4*>(to + s * p.sdx.l + thread % 8 * 8) =
              *reinterpret_cast<const uint4*>(m.leaving.at(s, thread % 8 * 8));
      if (thread < CHUNK) {  // what ends at t, less what begins there
        const float of_warps[4] = {m.columns[0][thread], m.columns[1][thread], m.columns[2][thread], m.columns[3][thread]};
        p.sums[(b.in_slices(p, b.index(p, tile)) * 4 + PASSING) * CHUNK + thread] =
            LATER ? 0.f : sum_of_four(of_warps) - m.rows[thread];
      }
    }
    pass_barrier(DELIVERED, 2 * GROUP);
  };
  float d_C[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d_C[i] = 0.f;
  each_tile<true>(p, b, copies, m, [&](int tile, Stage& now) {
    deliver(tile - 1);
    const Decays& decays = now.decays;
    const i64 index = b.in_slices(p, b.index(p, tile));
    float* to_sums = p.sums + index * (4 * CHUNK);
    float out[TILE / 2];
    begin_products();
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
      multiply<false, false>(out, by_rows(m.C, 16 * k), by_rows(now.before, 16 * k), k > 0);
    commit_products();
    unsigned dy[TILE / 16][4], outflow[TILE / 16][4];
    const float since[2] = {decays.since[r], decays.since[r + 8]};
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
      fetch(dy[k], now.dy, 16 * warp, 16 * k);
#pragma unroll
      for (int i = 0; i < 4; ++i) outflow[k][i] = scaled(dy[k][i], since[i % 2], since[i % 2]);
    }
    hold(d_C);
    begin_products();
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) multiply<true>(d_C, outflow[k], by_columns(now.before, 16 * k), 1);
    commit_products();
    float whole = 0.f, of_skip = 0.f;
#pragma unroll
    for (int piece = thread; piece < TILE * N / 8; piece += GROUP) {
      const uint4 a = reinterpret_cast<const uint4*>(now.before.v)[piece];
      const uint4 b = reinterpret_cast<const uint4*>(now.flow.v)[piece];
      whole += (dot(a.x, b.x) + dot(a.y, b.y)) + (dot(a.z, b.z) + dot(a.w, b.w));
    }
    if (!LATER)
#pragma unroll
      for (int k = 0; k < TILE / 16; ++k) {
        unsigned x[4];
        fetch(x, now.x, 16 * warp, 16 * k);
#pragma unroll
        for (int i = 0; i < 4; ++i) of_skip += dot(x[i], dy[k][i]);
      }
    whole = sum_of_warp(whole), of_skip = sum_of_warp(of_skip);
    if (lane == 0) m.warps[0][warp] = whole, m.warps[1][warp] = of_skip;
    sync_group(1);
    if (thread == 0) {
      p.of_chunks[2 * index] = sum_of_four(m.warps[0]) * decays.since[CHUNK - 1];
      if (!LATER) p.of_chunks[2 * index + 1] = sum_of_four(m.warps[1]);
    }
    await_products<1>();
    hold(out);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float ends = 0.f;
#pragma unroll
      for (int j = 0; j < TILE / 8; ++j) ends += dot(out + 4 * j + 2 * i, dy[j / 2][j % 2 * 2 + i]);
      ends = sum_of_quad(ends) * since[i];
      if (lane % 4 == 0) to_sums[ENDING * CHUNK + r + 8 * i] = ends;
    }
    await_products<0>();
    hold(d_C);
  });

  __syncthreads();
  deliver(b.first + b.count - 1);
  __syncthreads();
  hold(d_C);
  begin_products();
#pragma unroll
  for (int k = 0; k < CHUNK / 16; ++k)
    multiply<true, true>(d_C, by_columns(m.leaving, 16 * k), by_columns(m.B, 16 * k), 1);
  commit_products();
  await_products<0>();
  hold(d_C);
  keep_sums(p, b, d_C, p.partial_C, p.dC, p.sdC);
}

template <bool LATER> __device__ __forceinline__ void run(const Params& p) {
  extern __shared__ __align__(1024) char memory[];
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const Block b(p);
  const Rows<2 * GROUP, N> B(p.B + b.row * p.sB.b + b.of_groups * p.sB.h, p.sB.l, threadIdx.x);
  const Rows<2 * GROUP, N> C(p.C + b.row * p.sC.b + b.of_groups * p.sC.h, p.sC.l, threadIdx.x);
  const Copies<LATER> copies(p, b);
  float scores[CHUNK / 2];
  for (int slice = LATER ? 0 : (int)p.slices - 1; slice >= 0; --slice) {  // this one last
    B.copy(m.B.v, b.at.start * p.sB.l + slice * N, b.at.count());
    C.copy(m.C.v, b.at.start * p.sC.l + slice * N, b.at.count());
    commit_copies();
    if (slice == 0 && copies.mine && b.count > 0) copies.start(p, b, b.first, m.stages[0]);
    await_copies_but<0>();
    publish();
    __syncthreads();
    if (LATER) break;
    if (b.group == 0) {
      begin_products();
#pragma unroll
      for (int k = 0; k < N / 16; ++k)
        multiply<false, false>(scores, by_rows(m.B, 16 * k), by_rows(m.C, 16 * k), k > 0 || slice + 1 < p.slices);
      commit_products();
      await_products<0>();
      hold(scores);
    }
    if (slice > 0) __syncthreads();  // to be written over
  }
  if (!LATER && b.group == 0)
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j)
      m.scores[j][b.thread] = make_float4(scores[4 * j], scores[4 * j + 1], scores[4 * j + 2], scores[4 * j + 3]);
  if (b.group == 0) of_inputs<LATER>(p, b, copies, m);
  else of_outputs<LATER>(p, b, copies, m);
}

#define KERNEL extern "C" __global__ void __launch_bounds__(2 * GROUP, 1)
KERNEL backward(const __grid_constant__ Params p) { run<false>(p); }
KERNEL backward_later(const __grid_constant__ Params p) { run<true>(p); }
