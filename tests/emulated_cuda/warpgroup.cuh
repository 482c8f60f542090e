// The names of ophis/ops/cuda/warpgroup.cuh for the multiprocessor in instructions.cuh. A product is computed when it is
// begun, so that nothing here sees whether it was awaited, or what it reads published.
#pragma once
#include "instructions.cuh"

typedef unsigned short bfloat16;

template <int ROWS, int COLUMNS> struct alignas(1024) Matrix {
  bfloat16 v[ROWS * COLUMNS];

  static int place(int row, int column) {
    return column / 64 * (ROWS * 64) + row * 64 + ((column % 64 / 8) ^ (row % 8)) * 8 + column % 8;
  }
  bfloat16* at(int row, int column) { return v + place(row, column); }
};

inline float widened(bfloat16 v) { return __uint_as_float((unsigned)v << 16); }

struct Factor {
  const bfloat16* v;
  int rows, first;
  bool columns;

  float get(int i, int k) const {
    const int row = columns ? first + k : i, column = columns ? i : first + k;
    return widened(v[column / 64 * (rows * 64) + row * 64 + ((column % 64 / 8) ^ (row % 8)) * 8 + column % 8]);
  }
};

template <int ROWS, int COLUMNS> Factor by_rows(const Matrix<ROWS, COLUMNS>& m, int column) { return {m.v, ROWS, column, false}; }
template <int ROWS, int COLUMNS> Factor by_columns(const Matrix<ROWS, COLUMNS>& m, int row) { return {m.v, ROWS, row, true}; }

inline void begin_products() {}
inline void commit_products() {}
template <int PENDING> void await_products() {}
template <int COUNT> void hold(float (&)[COUNT]) {}
inline void publish() {}

template <int> void limit_registers() {}
template <int> void extend_registers() {}

inline int this_group() { return threadIdx.x / 128; }

inline Meeting groups[8];

inline void sync_group(int group) {
  groups[group].alive = 128;
  meet(groups[group]);
}

template <int COUNT> void add_up(float (&sums)[COUNT], const float (&a)[2][16], Factor b, int add) {
  const int c = 2 * (threadIdx.x % 4);
  for (int i = 0; i < COUNT; ++i) {
    float sum = add ? sums[i] : 0.f;
    for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * b.get(i / 4 * 8 + c + i % 2, k);
    sums[i] = sum;
  }
}

template <bool A_COLUMNS, bool B_COLUMNS, int COUNT> void multiply(float (&sums)[COUNT], Factor a, Factor b, int add) {
  if (A_COLUMNS != a.columns || B_COLUMNS != b.columns) std::abort();
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  float of_rows[2][16];
  for (int k = 0; k < 16; ++k) of_rows[0][k] = a.get(row, k), of_rows[1][k] = a.get(row + 8, k);
  add_up(sums, of_rows, b, add);
}

template <bool B_COLUMNS, int COUNT> void multiply(float (&sums)[COUNT], const unsigned (&a)[4], Factor b, int add) {
  if (B_COLUMNS != b.columns) std::abort();
  const int thread = threadIdx.x, first = thread / 4 * 4;
  for (int i = 0; i < 4; ++i) fibers[thread].given[i] = __uint_as_float(a[i]);
  __syncwarp();
  float of_rows[2][16];
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 2; ++i) {
      const unsigned both = __float_as_uint(fibers[first + k % 8 / 2].given[i + k / 8 * 2]);
      of_rows[i][k] = widened(k % 2 ? both >> 16 : both & 0xffff);
    }
  __syncwarp();
  add_up(sums, of_rows, b, add);
}

inline unsigned both(bfloat16 low, bfloat16 high) { return low | (unsigned)high << 16; }

template <int ROWS, int COLUMNS> void fetch(unsigned (&a)[4], Matrix<ROWS, COLUMNS>& m, int row, int column) {
  row += threadIdx.x % 32 / 4, column += 2 * (threadIdx.x % 4);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int r = row + i % 2 * 8, c = column + i / 2 * 8;
    a[i] = both(*m.at(r, c), *m.at(r, c + 1));
  }
}

template <int ROWS, int COLUMNS> void fetch_transposed(unsigned (&a)[4], Matrix<ROWS, COLUMNS>& m, int row, int column) {
  column += threadIdx.x % 32 / 4, row += 2 * (threadIdx.x % 4);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int r = row + i / 2 * 8, c = column + i % 2 * 8;
    a[i] = both(*m.at(r, c), *m.at(r + 1, c));
  }
}

template <int ROWS, int COLUMNS> void put(Matrix<ROWS, COLUMNS>& m, int row, int column, const unsigned (&a)[4]) {
  row += threadIdx.x % 32 / 4, column += 2 * (threadIdx.x % 4);
  for (int i = 0; i < 4; ++i) {
    const int r = row + i % 2 * 8, c = column + i / 2 * 8;
    *m.at(r, c) = a[i] & 0xffff, *m.at(r, c + 1) = a[i] >> 16;
  }
  __syncwarp();
}

template <int ROWS, int COLUMNS> void put_transposed(Matrix<ROWS, COLUMNS>& m, int row, int column, const unsigned (&a)[4]) {
  column += threadIdx.x % 32 / 4, row += 2 * (threadIdx.x % 4);
  for (int i = 0; i < 4; ++i) {
    const int r = row + i / 2 * 8, c = column + i % 2 * 8;
    *m.at(r, c) = a[i] & 0xffff, *m.at(r + 1, c) = a[i] >> 16;
  }
  __syncwarp();
}

inline void copy_piece(void* to, const void* from, bool there) { copy_async<16>(to, from, there); }
