// SSD: from raw steps to decays, and back from gradients, for which a warp takes a chunk of a head, a thread two positions;
// and what is added up in the end.
//
// Compiled with, besides what ssd.cuh wants: DT_KIND, HAS_BIAS, SOFTPLUS, LIMITED.
#include "numbers.cuh"
#include "ssd.cuh"

// A step's log2 of decay below which float32 has only 0. Held to it, the running sums of a chunk stay so small that their
// rounding moves a decay by at most 64 * 160 * 2^-24 ln 2 = 4e-4, a fifth of what bfloat16 resolves.
constexpr float LOWEST = -160.f;

using DT = Stored<DT_KIND>::type;

constexpr int WARPS = 8;  // of a block. Neighbouring ones have neighbouring heads, whose steps lie side by side in memory

struct Shared {
  DT raw[WARPS][CHUNK + 2];  // or the gradients of that
  i64 places[WARPS];
  int counts[WARPS];
};

// Each position's numbers of all the block's warps together, where a warp by itself would have one number a position.
template <class Function> __device__ __forceinline__ void each_number(const Shared& m, i64 step, Function function) {
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < WARPS * CHUNK; i += WARPS * 32) {
    const int warp = i % WARPS, t = i / WARPS;
    if (t < m.counts[warp]) function(warp, t, m.places[warp] + t * step);
  }
  __syncthreads();
}

struct Warp {  // its chunk and head, and what its thread knows of two positions
  i64 index, chunk, row;
  int warp, head, t, lane;
  bool there;
  Place at;
  float step[2], slope[2];  // the step, and its derivative by dt

  __device__ __forceinline__ Warp(const Params& p, Shared& m) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = 2 * lane;
    index = (i64)blockIdx.x * WARPS + warp;
    chunk = index / p.heads, head = (int)(index % p.heads);
    there = chunk < p.batch * p.chunks;
    row = PACKED || !there ? 0 : chunk / p.chunks;
    const int of_row = there ? (int)(chunk - row * p.chunks) : 0;
    at = place_of(p, of_row, PACKED ? sequence_of(p, of_row, CHUNK) : 0);
    if (lane == 0) {
      m.counts[warp] = there ? at.count() : 0;
      m.places[warp] = row * p.sdt.b + at.start * p.sdt.l + head * p.sdt.h;
    }
    each_number(m, p.sdt.l, [&](int warp, int t, i64 from) { m.raw[warp][t] = ((const DT*)p.dt)[from]; });
    for (int i = 0; i < 2; ++i) {
      step[i] = slope[i] = 0.f;
      if (!there || t + i >= at.count()) continue;  // beyond the sequence the state stays as it was
      float raw = widen<DT_KIND>(m.raw[warp][t + i]);
      if (HAS_BIAS) raw += p.bias[head];
      const float free = SOFTPLUS ? softplus(raw) : raw;
      step[i] = LIMITED ? fminf(fmaxf(free, p.low), p.high) : free;
      slope[i] = SOFTPLUS ? sigmoid(raw) : 1.f;
      if (LIMITED && (free < p.low || free > p.high)) slope[i] = 0.f;
    }
  }
};

__device__ __forceinline__ float sum_up_to(float v, int lane) {  // over the warp's threads, this one's included
#pragma unroll
  for (int k = 1; k < 32; k *= 2) {
    const float other = __shfl_up_sync(~0u, v, k);
    if (lane >= k) v += other;
  }
  return v;
}

__device__ __forceinline__ float sum_of_all(float v) {
#pragma unroll
  for (int k = 1; k < 32; k *= 2) v += __shfl_xor_sync(~0u, v, k);
  return v;
}

extern "C" __global__ void steps(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char memory[];
  const Warp w(p, *reinterpret_cast<Shared*>(memory));
  if (!w.there) return;
  const float rate = p.A[w.head] * LOG2E;
  const float log[2] = {fmaxf(w.step[0] * rate, LOWEST), fmaxf(w.step[1] * rate, LOWEST)};
  const float both = sum_up_to(log[0] + log[1], w.lane), total = sum_of_all(log[0] + log[1]);
  const float since[2] = {both - log[1], both};
  Decays& to = p.decays[w.index];
  auto put = [&](float (&row)[CHUNK], float first, float second) {
    *reinterpret_cast<float2*>(row + w.t) = make_float2(first, second);
  };
  put(to.log, since[0], since[1]);
  put(to.step, w.step[0], w.step[1]);
  put(to.until, w.step[0] * exp2_fast(total - since[0]), w.step[1] * exp2_fast(total - since[1]));
  put(to.since, exp2_fast(since[0]), exp2_fast(since[1]));
}

// What the backward pass leaves for each tile and position, and what of it passes the decay at t: the flows that end at t
// or later and began before the chunk, or before t; those that began before t and end after the chunk; those through all.
enum Sum { ENDING, PASSING, ENTERING, DIRECT };

extern "C" __global__ void d_steps(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char memory[];
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const Warp w(p, m);
  float behind[2] = {}, into[2] = {}, direct[2] = {}, whole = 0.f;
  const i64 tiles = p.batch * p.chunks * p.heads * PARTS;  // of a slice
  for (i64 part = 0; part < (w.there ? p.slices * PARTS : 0); ++part) {
    const i64 tile = part / PARTS * tiles + w.index * PARTS + part % PARTS;
    const float* sums = p.sums + tile * (4 * CHUNK) + w.t;
    auto get = [&](Sum which) { return *reinterpret_cast<const float2*>(sums + which * CHUNK); };
    const float2 ending = get(ENDING), passing = get(PASSING), entering = get(ENTERING), of_step = get(DIRECT);
    behind[0] += ending.x + passing.x, behind[1] += ending.y + passing.y;
    into[0] += entering.x, into[1] += entering.y;
    direct[0] += of_step.x, direct[1] += of_step.y;
    whole += p.of_chunks[tile * 2];
  }
  const float earlier = sum_up_to(into[0] + into[1], w.lane) - (into[0] + into[1]);
  const float later = sum_of_all(behind[0] + behind[1]) - sum_up_to(behind[0] + behind[1], w.lane);
  const float d_log[2] = {later + behind[1] + behind[0] + earlier + whole, later + behind[1] + earlier + into[0] + whole};
  const float rate = p.A[w.head];
  float of_rate = 0.f, of_bias = 0.f;
  for (int i = 0; i < 2; ++i) {
    const float d_raw = (direct[i] + rate * d_log[i]) * w.slope[i];
    of_rate += w.step[i] * d_log[i], of_bias += d_raw;
    m.raw[w.warp][w.t + i] = narrow<DT_KIND>(d_raw);
  }
  if (w.lane == 0) m.places[w.warp] = (w.row * p.length + w.at.start) * p.heads + w.head;
  each_number(m, p.heads, [&](int warp, int t, i64 to) { ((DT*)p.d_dt)[to] = m.raw[warp][t]; });
  of_rate = sum_of_all(of_rate), of_bias = sum_of_all(of_bias);
  if (w.lane == 0 && w.there) {
    p.partial_A[w.chunk * 2 * p.heads + w.head] = of_rate;
    p.partial_A[(w.chunk * 2 + 1) * p.heads + w.head] = of_bias;
  }
}

// A warp adds up what all chunks have for one head's A, bias or D. The latter is no sum over states: the first slice's.
extern "C" __global__ void add_chunks(const __grid_constant__ Params p) {
  const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int head = warp / 3, what = warp % 3;
  float* const to = what == 0 ? p.dA : what == 1 ? p.d_bias : p.dD;
  if (head >= p.heads || !to) return;
  float sum = 0.f;
  for (i64 chunk = lane; chunk < p.batch * p.chunks; chunk += 32) {
    if (what < 2) sum += p.partial_A[(chunk * 2 + what) * p.heads + head];
    else
      for (int part = 0; part < PARTS; ++part) sum += p.of_chunks[((chunk * p.heads + head) * PARTS + part) * 2 + 1];
  }
  sum = sum_of_all(sum);
  if (lane == 0) to[head] = sum;
}

// dB and dC from what blocks have that share out the heads of a group. A thread adds up two numbers.
extern "C" __global__ void add_splits(const __grid_constant__ Params p) {
  const i64 size = p.batch * p.length * p.groups * N;
  i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 2;
  if (i >= 2 * size) return;
  const bool of_C = i >= size;
  if (of_C) i -= size;
  const float* from = (of_C ? p.partial_C : p.partial_B) + i;
  float2 sum = {0.f, 0.f};
  for (int split = 0; split < p.splits; ++split) {
    const float2 v = *reinterpret_cast<const float2*>(from + split * size);
    sum.x += v.x, sum.y += v.y;
  }
  const i64 group = i / N % p.groups, position = i / (N * p.groups);
  const Strides& s = of_C ? p.sdC : p.sdB;
  const i64 to = position / p.length * s.b + position % p.length * s.l + group * s.h + i % N;
  *reinterpret_cast<unsigned*>((of_C ? p.dC : p.dB) + to) = to_bfloats(sum.x, sum.y);
}
