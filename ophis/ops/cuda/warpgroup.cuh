// Matrix products of a warpgroup, 128 threads, on the tensor cores of compute capability 9.0, in bfloat16.
//
// A product adds to sums of 64 rows and WIDTH columns the product of 64 x 16 and 16 x WIDTH numbers. Thread t of the
// group has, of the sums, rows r = 16 (t / 32) + t % 32 / 4 and r + 8: for each block j of 8 columns, with
// c = 8 j + 2 (t % 4), sums[4 j] is (r, c), sums[4 j + 1] is (r, c + 1), and the next two are the same of row r + 8.
// A left factor in registers ("fragments") is shared out alike: (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8) with
// c = 2 (t % 4), each with its neighbour in one register.
#pragma once
#include "instructions.cuh"

typedef unsigned short bfloat16;  // its bits

// A matrix in shared memory, at a multiple of 1024 bytes. Panels of 64 columns lie one after the other; in a panel a row
// takes 128 bytes, whose eight pieces of 16 bytes are permuted by the row: eight rows of one column are then in
// different banks. That is what the tensor cores call a swizzle of 128 bytes.
template <int ROWS, int COLUMNS> struct alignas(1024) Matrix {
  bfloat16 v[ROWS * COLUMNS];

  __device__ __forceinline__ static int place(int row, int column) {
    return column / 64 * (ROWS * 64) + row * 64 + ((column % 64 / 8) ^ (row % 8)) * 8 + column % 8;
  }
  __device__ __forceinline__ bfloat16* at(int row, int column) { return v + place(row, column); }
};

// What a product reads from shared memory: 16 terms of every sum, of a factor of so many rows (or columns).
struct Factor { unsigned long long descriptor; };

__device__ __forceinline__ unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Leading: bytes from one panel to the next; stride: from eight rows to the next eight. `offset` is a constant, what it is
// added to is the same for all of a matrix's factors, and the upper half is a constant altogether.
__device__ __forceinline__ Factor factor_at(const void* matrix, unsigned leading, unsigned stride, int offset) {
  const unsigned low = (address(matrix) >> 4 | leading >> 4 << 16) + (offset >> 4), high = stride >> 4 | 1u << 30;
  return {(unsigned long long)high << 32 | low};
}

// Its rows are the matrix's, its terms 16 columns from `column` on.
template <int ROWS, int COLUMNS> __device__ __forceinline__ Factor by_rows(const Matrix<ROWS, COLUMNS>& m, int column) {
  return factor_at(m.v, 16, 1024, column / 64 * (ROWS * 128) + column % 64 * 2);
}

// Its rows are the matrix's columns, its terms 16 rows from `row` on.
template <int ROWS, int COLUMNS> __device__ __forceinline__ Factor by_columns(const Matrix<ROWS, COLUMNS>& m, int row) {
  return factor_at(m.v, ROWS * 128, 1024, row * 128);
}

// Between them registers that products read or write are left alone, by us and by the compiler.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int COUNT> __device__ __forceinline__ void hold(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// What threads wrote into shared memory is visible to the tensor cores, once all have passed a barrier after this.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Which warpgroup of the block this is; the same for a warp's threads, and the compiler is to know it.
__device__ __forceinline__ int this_group() { return __shfl_sync(~0u, (int)threadIdx.x / 128, 0); }

// How many registers its threads have from here on, at most what others have left; all of the warpgroup agree.
template <int COUNT> __device__ __forceinline__ void limit_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void extend_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A barrier of the warpgroup `group`; barrier 0 is the block's.
__device__ __forceinline__ void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

#define SUMS_8(i) \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define SUMS_64 SUMS_32(0), SUMS_32(32)
#define SUMS_128 SUMS_32(0), SUMS_32(32), SUMS_32(64), SUMS_32(96)
#define NUMBERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// sums = a b, plus what they were if `add`. The factors with COLUMNS are those made `by_columns`.
template <bool A_COLUMNS, bool B_COLUMNS, int COUNT>
__device__ __forceinline__ void multiply(float (&sums)[COUNT], Factor a, Factor b, int add) {
  if constexpr (COUNT == 32)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        NUMBERS_64 "}, %32, %33, p, 1, 1, %35, %36; }"
        : SUMS_32(0)
        : "l"(a.descriptor), "l"(b.descriptor), "r"(add), "n"((int)A_COLUMNS), "n"((int)B_COLUMNS));
  else if constexpr (COUNT == 64)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        NUMBERS_128 "}, %64, %65, p, 1, 1, %67, %68; }"
        : SUMS_64
        : "l"(a.descriptor), "l"(b.descriptor), "r"(add), "n"((int)A_COLUMNS), "n"((int)B_COLUMNS));
  else if constexpr (COUNT == 128)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        NUMBERS_256 "}, %128, %129, p, 1, 1, %131, %132; }"
        : SUMS_128
        : "l"(a.descriptor), "l"(b.descriptor), "r"(add), "n"((int)A_COLUMNS), "n"((int)B_COLUMNS));
  else
    static_assert(COUNT == 32, "a product has 64, 128 or 256 columns");
}

// The same with the left factor in registers, which stay as they are until the product is awaited.
template <bool B_COLUMNS, int COUNT>
__device__ __forceinline__ void multiply(float (&sums)[COUNT], const unsigned (&a)[4], Factor b, int add) {
  if constexpr (COUNT == 32)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        NUMBERS_64 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
        : SUMS_32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(add), "n"((int)B_COLUMNS));
  else if constexpr (COUNT == 64)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        NUMBERS_128 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
        : SUMS_64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(add), "n"((int)B_COLUMNS));
  else if constexpr (COUNT == 128)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %133, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        NUMBERS_256 "}, {%128, %129, %130, %131}, %132, p, 1, 1, %134; }"
        : SUMS_128
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(add), "n"((int)B_COLUMNS));
  else
    static_assert(COUNT == 32, "a product has 64, 128 or 256 columns");
}

// 16 x 16 numbers at (row, column), the upper left corner of a warp's 16 rows, as a left factor's fragments.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void fetch(unsigned (&a)[4], Matrix<ROWS, COLUMNS>& m, int row, int column) {
  const int lane = threadIdx.x % 32;
  const unsigned from = address(m.at(row + lane % 16, column + lane / 16 * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from)
               : "memory");
}

// The same of the transpose: the factor's rows are 16 columns from `column` on, its terms 16 rows from `row` on.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void fetch_transposed(unsigned (&a)[4], Matrix<ROWS, COLUMNS>& m, int row, int column) {
  const int lane = threadIdx.x % 32;
  const unsigned from = address(m.at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from)
               : "memory");
}

// Fragments into a matrix, and transposed.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void put(Matrix<ROWS, COLUMNS>& m, int row, int column, const unsigned (&a)[4]) {
  const int lane = threadIdx.x % 32;
  const unsigned to = address(m.at(row + lane % 16, column + lane / 16 * 8));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3])
               : "memory");
}

template <int ROWS, int COLUMNS>
__device__ __forceinline__ void put_transposed(Matrix<ROWS, COLUMNS>& m, int row, int column, const unsigned (&a)[4]) {
  const int lane = threadIdx.x % 32;
  const unsigned to = address(m.at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3])
               : "memory");
}

__device__ __forceinline__ void copy_piece(void* to, const void* from, bool there) {  // past the first-level cache
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
