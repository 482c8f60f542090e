// SSD, forward; and the states at all chunks' bounds, or their gradients, for the backward pass.
//
// A block takes two tiles, of one head or two that share B and C, through a segment of chunks: a warpgroup a tile, whose
// state (p, n) stays in the sums of its products. For a chunk,
//
//   S = C B^T          (t, s)     then L ∘ S, with decays and steps, as bfloat16 into shared memory
//   y^T = h C^T        (p, t)     times the decays since the chunk's start
//   y^T += x^T (L ∘ S)^T
//   h = decay h + (x ∘ w)^T B     (p, n)     w: the steps times the decays until the chunk's end
//
// all but the third are begun before the first is awaited: while threads work on S, the tensor cores do the rest. A third
// warpgroup copies for both.
#include "ssd.cuh"

constexpr bool WIDE = N > 128;                // a state that leaves few registers, and little memory, to the rest
constexpr int TOGETHER = WIDE ? 4 : N / 16;  // sixteenths of a state that are on their way into a product
enum What { OUTPUTS, STATES, ENDS, FLOWS, FLOW_ENDS };  // a block's work; of states alone: all of them, or a segment's end

template <What WHAT> constexpr bool IS_ENDS = WHAT == ENDS || WHAT == FLOW_ENDS;
// Scores are found a chunk ahead, if there are registers for them, and memory for a third chunk.
template <What WHAT> constexpr bool AHEAD = WHAT == OUTPUTS && !WIDE;
template <What WHAT> constexpr int STAGES = AHEAD<WHAT> || IS_ENDS<WHAT> ? 3 : 2;
template <What WHAT> constexpr bool BACK = WHAT == FLOWS || WHAT == FLOW_ENDS;
// Where threads have most to do, others copy for them, and leave them registers: of three warpgroups a thread has 168.
template <What WHAT> constexpr bool HAS_COPIERS = WHAT == OUTPUTS;
constexpr int OF_WALKERS = 232, OF_COPIERS = 40;
static_assert(2 * OF_WALKERS + OF_COPIERS <= 3 * 168);

template <bool WITH_OUTPUTS> struct Stage {  // what comes from memory for a chunk
  Matrix<CHUNK, N> B;
  Matrix<WITH_OUTPUTS ? CHUNK : 8, WITH_OUTPUTS ? N : 64> C;
  Matrix<CHUNK, TILE> x[2];
  Decays decays[2];
};

template <What WHAT> struct Shared {
  Stage<WHAT == OUTPUTS> stages[STAGES<WHAT>];
  // The scores (t, s); or the states (p, n).
  Matrix<IS_ENDS<WHAT> ? 8 : TILE, WHAT == OUTPUTS || IS_ENDS<WHAT> ? CHUNK : N> leaving[2];
  Matrix<WHAT == OUTPUTS ? CHUNK : 8, TILE> outputs[2];  // (t, p), in a place of their own: nobody waits for the scores
};

template <What WHAT> struct Work {  // of a block: two tiles, through which chunks of which row
  int heads, tiles, pair, of_groups, segment, first, count;
  i64 row;

  __device__ __forceinline__ explicit Work(const Params& p) {
    heads = (int)(p.heads / p.groups), tiles = heads * PARTS;
    const int pairs = (tiles + 1) / 2, work = (int)p.groups * pairs, taken = WHAT == OUTPUTS ? (int)p.taken : 1;
    const int counted = IS_ENDS<WHAT> ? (int)p.ends : ((int)p.segments + taken - 1) / taken;
    pair = blockIdx.x % work % pairs, of_groups = blockIdx.x % work / pairs;
    segment = blockIdx.x / work % counted * taken + (WHAT == FLOW_ENDS);
    row = blockIdx.x / work / counted;
    first = segment * (int)p.segment, count = least(taken * (int)p.segment, (int)p.chunks - first);
  }
  __device__ __forceinline__ int chunk(int i) const { return BACK<WHAT> ? first + count - 1 - i : first + i; }  // of its way
  __device__ __forceinline__ bool active(int group) const { return 2 * pair + group < tiles; }
  __device__ __forceinline__ int tile(int group) const {  // the second may not exist: it is the first once more
    return least(2 * pair + group, tiles - 1);
  }
  __device__ __forceinline__ int head(int group) const { return of_groups * heads + tile(group) / PARTS; }
  __device__ __forceinline__ int channel(int group) const { return tile(group) % PARTS * TILE; }
};

// What comes from memory: B and C by all threads that copy, x and decays of both tiles, or by each warpgroup of its own.
template <What WHAT> struct Copies {
  static constexpr int COUNT = STAGES<WHAT>, THREADS = HAS_COPIERS<WHAT> ? GROUP : 2 * GROUP, TILES = 2 * GROUP / THREADS;
  static constexpr int COLUMNS = N < THREADS ? N : THREADS;
  const Params& p;
  const Work<WHAT>& w;
  Shared<WHAT>& m;
  const Strides &of_value, &of_matrix;
  const int thread, first_tile;
  const Rows<THREADS, COLUMNS> B, C;
  const Rows<GROUP, TILE> x;
  int sequence;  // of the chunk last copied

  __device__ __forceinline__ Copies(const Params& p, const Work<WHAT>& w, Shared<WHAT>& m)
      : p(p), w(w), m(m), of_value(BACK<WHAT> ? p.sdy : p.sx), of_matrix(BACK<WHAT> ? p.sC : p.sB),
        thread(threadIdx.x % GROUP), first_tile(TILES == 1 ? this_group() : 0),
        B((BACK<WHAT> ? p.C : p.B) + w.row * of_matrix.b + w.of_groups * of_matrix.h, of_matrix.l, threadIdx.x % THREADS),
        C(p.C + w.row * p.sC.b + w.of_groups * p.sC.h, p.sC.l, threadIdx.x % THREADS),
        x((BACK<WHAT> ? p.dy : p.x) + w.row * of_value.b, of_value.l, thread),
        sequence(PACKED ? sequence_of(p, w.chunk(0), CHUNK) : 0) {}

  // The chunk number i of the way; nothing after the last one, but groups of copies are counted.
  __device__ __forceinline__ void start(int i) {
    if (i < w.count) {
      auto& to = m.stages[i % COUNT];
      const int chunk = w.chunk(i);
      if (PACKED) sequence = follow(p, chunk, sequence);
      const Place at = place_of(p, chunk, sequence);
#pragma unroll
      for (int n = 0; n < N; n += COLUMNS) {
        B.copy(to.B.v + n * CHUNK, at.start * of_matrix.l + n, at.count());
        if constexpr (WHAT == OUTPUTS) C.copy(to.C.v + n * CHUNK, at.start * p.sC.l + n, at.count());
      }
#pragma unroll
      for (int k = 0; k < TILES; ++k) {
        const int tile = first_tile + k;
        x.copy(to.x[tile].v, at.start * of_value.l + w.head(tile) * of_value.h + w.channel(tile), at.count());
      }
      if (thread < TILES * DECAYS_PIECES) {
        const int tile = first_tile + thread / DECAYS_PIECES;
        const i64 from = (w.row * p.chunks + chunk) * p.heads + w.head(tile);
        copy_piece(to.decays[tile], p.decays[from], thread % DECAYS_PIECES);
      }
    }
    commit_copies();
  }
  template <int PENDING> __device__ __forceinline__ void arrive() {  // for the tensor cores too
    await_copies_but<PENDING>();
    publish();
    __syncthreads();
  }
};

template <What WHAT> __device__ __forceinline__ void walk(const Params& p) {
  constexpr int COUNT = STAGES<WHAT>;
  extern __shared__ __align__(1024) char memory[];
  Shared<WHAT>& m = *reinterpret_cast<Shared<WHAT>*>(memory);
  const int thread = threadIdx.x % GROUP, group = this_group(), lane = thread % 32, warp = thread / 32;
  const int r = 16 * warp + lane / 4, c = 2 * (lane % 4);  // this thread's rows r and r + 8, columns c and c + 1 of eight
  const Work<WHAT> w(p);
  Copies<WHAT> copies(p, w, m);
  if constexpr (HAS_COPIERS<WHAT>) {
    if (group == 2) {
      limit_registers<OF_COPIERS>();
      copies.start(0);
      if (AHEAD<WHAT>) {
        copies.template arrive<0>();
        copies.start(1);
      }
      for (int i = 0; i < w.count; ++i) {
        copies.template arrive<0>();
        copies.start(i + COUNT - 1);
      }
      return;
    }
    extend_registers<OF_WALKERS>();
  }
  const int head = w.head(group), channel = w.channel(group), count = w.count;
  const bool active = w.active(group);
  const i64 row = w.row;
  const i64 y_step = p.heads * p.width;
  bfloat16* rows_y = p.y + (row * p.length + thread / 8) * y_step + head * p.width + channel + thread % 8 * 8;
  const float* edge = BACK<WHAT> ? p.d_final : p.initial;
  float* far_edge = WHAT == OUTPUTS ? p.final_state : WHAT == FLOWS ? p.d_initial : nullptr;
  bfloat16* states = BACK<WHAT> ? p.flows : p.states;

  auto state_at = [&](i64 index) { return ((index * p.heads + head) * p.width + channel) * N; };
  float h[N / 2];  // (p, n)
  auto each_state = [&](auto function) {  // of pairs of neighbours (p, n) and (p, n + 1)
#pragma unroll
    for (int i = 0; i < N / 2; i += 2) function(h[i], h[i + 1], (i64)(r + i / 2 % 2 * 8) * N + i / 4 * 8 + c);
  };
  auto enter = [&](const float* from, i64 index) {
    if (from) from += state_at(index);
    each_state([&](float& low, float& high, i64 at) {
      const float2 v = from ? *reinterpret_cast<const float2*>(from + at) : make_float2(0.f, 0.f);
      low = v.x, high = v.y;
    });
  };
  auto leave = [&](float* to, i64 index) {
    if (!active) return;
    to += state_at(index);
    each_state([&](float low, float high, i64 at) { *reinterpret_cast<float2*>(to + at) = make_float2(low, high); });
  };
  if (!IS_ENDS<WHAT> && p.ends > 0) enter(p.passed, row * p.segments + w.segment);
  else if (!IS_ENDS<WHAT> && !PACKED) enter(edge, row);
  else enter(nullptr, 0);

  int sequence = PACKED ? sequence_of(p, w.chunk(0), CHUNK) : 0;
  float passing = 0.f;
  float skip[2];
  if (WHAT == OUTPUTS)
    for (int i = 0; i < 2; ++i) skip[i] = p.D ? p.D[head * p.D_h + (channel + r + 8 * i) * p.D_p] : 0.f;

  float scores[CHUNK / 2];
  auto find_scores = [&](auto& of) {
    begin_products();
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
      multiply<false, false>(scores, by_rows(of.C, 16 * k), by_rows(of.B, 16 * k), k > 0);
    commit_products();
  };
  auto& leaving = m.leaving[group];

  if constexpr (AHEAD<WHAT>) {
    __syncthreads();  // the first chunk is there
    find_scores(m.stages[0]);
    await_products<0>();
    hold(scores);
  } else if constexpr (!HAS_COPIERS<WHAT>) {
    for (int i = 0; i < COUNT - 1; ++i) copies.start(i);
  }
  for (int i = 0; i < count; ++i) {
    auto& now = m.stages[i % COUNT];
    const Decays& decays = now.decays[group];
    if constexpr (!HAS_COPIERS<WHAT>) {
      copies.template arrive<COUNT - 2>();
      copies.start(i + COUNT - 1);
    } else if constexpr (!AHEAD<WHAT>) {
      __syncthreads();
      find_scores(now);
    }
    const int chunk = w.chunk(i);
    if (PACKED) sequence = follow(p, chunk, sequence);
    const Place at = place_of(p, chunk, sequence);
    if (PACKED && (BACK<WHAT> ? at.is_last() : at.is_first())) {
      enter(edge, sequence);
      passing = NOTHING;
    }
    if (IS_ENDS<WHAT>) passing += decays.log[CHUNK - 1];
    if (WHAT == STATES || WHAT == FLOWS) {
      sync_group(group);  // the states of the chunk before have left
#pragma unroll
      for (int k = 0; k < N / 16; ++k) {
        unsigned a[4];
        as_fragments(a, h, k);
        put(leaving, 16 * warp, 16 * k, a);
      }
      sync_group(group);
      if (active) {
        bfloat16* to = states + state_at(row * p.chunks + chunk);
#pragma unroll
        for (int piece = thread; piece < TILE * N / 8; piece += GROUP)
          *reinterpret_cast<uint4*>(to + 8 * piece) =
              *reinterpret_cast<const uint4*>(leaving.at(piece / (N / 8), piece % (N / 8) * 8));
      }
    }

    const float left = decays.since[CHUNK - 1];
    float y[CHUNK / 2];
    unsigned of_state[TOGETHER][4], x[CHUNK / 16][4], inflow[CHUNK / 16][4];  // x^T: channels are rows
    auto weigh_scores = [&] {  // L ∘ S times the steps
      const float log[2] = {decays.log[r], decays.log[r + 8]};
#pragma unroll
      for (int k = 0; k < CHUNK / 16; ++k) {
        unsigned a[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int s = 16 * k + 8 * j + c;
          const float2 before = *reinterpret_cast<const float2*>(decays.log + s);
          const float2 step = *reinterpret_cast<const float2*>(decays.step + s);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int t = r + 8 * i;
            const float* of = scores + 8 * k + 4 * j + 2 * i;
            const float low = of[0] * step.x * exp2_fast(s <= t ? log[i] - before.x : NOTHING);
            const float high = of[1] * step.y * exp2_fast(s + 1 <= t ? log[i] - before.y : NOTHING);
            a[2 * j + i] = to_bfloats(low, high);
          }
        }
        put(leaving, 16 * warp, 16 * k, a);
      }
      publish();
    };
    auto take_state = [&](int first) {
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) as_fragments(of_state[k], h, first + k);
    };
    auto read_state = [&](int first) {
      begin_products();
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k)
        multiply<false>(y, of_state[k], by_rows(now.C, 16 * (first + k)), first + k > 0);
      commit_products();
    };

    if constexpr (WHAT == OUTPUTS && WIDE) {  // one after the other, for want of registers
      await_products<0>();
      hold(scores);
      weigh_scores();
      sync_group(group);
#pragma unroll
      for (int k = 0; k < N / 16; k += TOGETHER) {
        take_state(k);
        read_state(k);
        await_products<0>();
        hold(y);
      }
    } else if constexpr (WHAT == OUTPUTS) {
      take_state(0);
    }
#pragma unroll
    for (int k = 0; k < N / 2; ++k) h[k] *= left;
    hold(h);
    if constexpr (WHAT == OUTPUTS && !WIDE) read_state(0);
    const float* weights = BACK<WHAT> ? decays.since : decays.until;
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) {
      fetch_transposed(x[k], now.x[group], 16 * k, 16 * warp);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 w = *reinterpret_cast<const float2*>(weights + 16 * k + 8 * j + c);
        inflow[k][2 * j] = scaled(x[k][2 * j], w.x, w.y);
        inflow[k][2 * j + 1] = scaled(x[k][2 * j + 1], w.x, w.y);
      }
    }
    begin_products();
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) multiply<true>(h, inflow[k], by_columns(now.B, 16 * k), 1);
    commit_products();

    if constexpr (WHAT == OUTPUTS) {
      if (!WIDE) {
        weigh_scores();
        __syncthreads();  // the next chunk is there; and all have done with the one before
        await_products<1>();
      }
      hold(y);
#pragma unroll
      for (int j = 0; j < CHUNK / 8; ++j) {
        const float2 since = *reinterpret_cast<const float2*>(decays.since + 8 * j + c);
        y[4 * j] *= since.x, y[4 * j + 1] *= since.y, y[4 * j + 2] *= since.x, y[4 * j + 3] *= since.y;
      }
      hold(y);
      begin_products();
#pragma unroll
      for (int k = 0; k < CHUNK / 16; ++k) multiply<false>(y, x[k], by_rows(leaving, 16 * k), 1);
      commit_products();
      if (!WIDE) find_scores(m.stages[(i + 1) % COUNT]);  // goes on while the outputs leave; nobody reads the last one's
      await_products<WIDE ? 0 : 1>();
      hold(y);
#pragma unroll
      for (int k = 0; k < CHUNK / 16; ++k) {
        unsigned a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // y^T lies as x^T does
          const float* of = y + 8 * k + 2 * i;
          a[i] = to_bfloats(fmaf(skip[i % 2], low_half(x[k][i]), of[0]), fmaf(skip[i % 2], high_half(x[k][i]), of[1]));
        }
        put_transposed(m.outputs[group], 16 * k, 16 * warp, a);
      }
      sync_group(group);
      if (active) {
        bfloat16* to = rows_y + at.start * y_step;
#pragma unroll
        for (int t = 0; t < CHUNK; t += GROUP / 8)
          if (thread / 8 + t < at.count())
            *reinterpret_cast<uint4*>(to + t * y_step) =
                *reinterpret_cast<const uint4*>(m.outputs[group].at(thread / 8, thread % 8 * 8) + t * 64);
      }
    }
    await_products<0>();
    hold(h);
    if (AHEAD<WHAT>) hold(scores);
    if (PACKED && far_edge && (BACK<WHAT> ? at.is_first() && at.start < at.end : at.is_last())) leave(far_edge, sequence);
  }
  if (IS_ENDS<WHAT>) {  // where the next segment is entered
    const i64 next = row * p.segments + w.segment + (BACK<WHAT> ? -1 : 1);
    leave(p.passed, next);
    if (active && thread == 0 && channel == 0) p.totals[next * p.heads + head] = passing;
  } else if (!PACKED && far_edge && (BACK<WHAT> ? w.first == 0 : w.first + count == p.chunks)) {
    leave(far_edge, row);
  }
}

#define KERNEL(BLOCKS) extern "C" __global__ void __launch_bounds__(2 * GROUP, BLOCKS)
extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) outputs(const __grid_constant__ Params p) { walk<OUTPUTS>(p); }
KERNEL(WIDE ? 1 : 2) states(const __grid_constant__ Params p) { walk<STATES>(p); }
KERNEL(WIDE ? 1 : 2) ends(const __grid_constant__ Params p) { walk<ENDS>(p); }
KERNEL(WIDE ? 1 : 2) flows(const __grid_constant__ Params p) { walk<FLOWS>(p); }
KERNEL(WIDE ? 1 : 2) flow_ends(const __grid_constant__ Params p) { walk<FLOW_ENDS>(p); }

// From the ends of segments, each from zeros, to the states that segments are entered with. A thread has four neighbours of
// a head's states, and asks for several segments' at once: one by one it would wait for memory as often.
template <What WHAT> __device__ __forceinline__ void pass_on(const Params& p) {
  constexpr int TOGETHER = 8;
  const i64 i = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x), size = p.heads * p.width * N;
  if (i >= p.batch * size) return;
  const i64 row = i / size, head = i % size / (p.width * N);
  const float* edge = BACK<WHAT> ? p.d_final : p.initial;
  float4 state = !PACKED && edge ? *reinterpret_cast<const float4*>(edge + i) : make_float4(0.f, 0.f, 0.f, 0.f);
  auto segment = [&](int k) { return row * p.segments + (BACK<WHAT> ? p.segments - 1 - k : k); };
  auto at = [&](int k) { return reinterpret_cast<float4*>(p.passed + segment(k) * size + i % size); };
  *at(0) = state;
  for (int first = 1; first <= p.ends; first += TOGETHER) {
    float4 ends[TOGETHER];
    float left[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k)
      if (first + k <= p.ends) ends[k] = *at(first + k), left[k] = exp2_fast(p.totals[segment(first + k) * p.heads + head]);
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
      if (first + k > p.ends) break;
      state.x = fmaf(left[k], state.x, ends[k].x), state.y = fmaf(left[k], state.y, ends[k].y);
      state.z = fmaf(left[k], state.z, ends[k].z), state.w = fmaf(left[k], state.w, ends[k].w);
      *at(first + k) = state;
    }
  }
}

extern "C" __global__ void pass_states(const __grid_constant__ Params p) { pass_on<STATES>(p); }
extern "C" __global__ void pass_flows(const __grid_constant__ Params p) { pass_on<FLOWS>(p); }
