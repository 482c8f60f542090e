// Which of the packed sequences a position, or a chunk of positions, belongs to. `Params` has their offsets.
#pragma once
#include "instructions.cuh"

typedef long long i64;

// The sequence that a position lies in: the last one that starts at or before it.
template <class Params> __device__ __forceinline__ int sequence_at(const Params& p, i64 position) {
  int low = 0, high = (int)p.sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.offsets[middle] <= position) low = middle; else high = middle - 1;
  }
  return low;
}

// Chunks of `run` positions end where sequences end. Sequence i has those from offsets[i] / run + i on: at least as many as
// it needs, and a chunk too many begins past its end.
template <class Params> __device__ __forceinline__ int sequence_of(const Params& p, int chunk, int run) {
  int low = 0, high = (int)p.sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.offsets[middle] / run + middle <= chunk) low = middle; else high = middle;
  }
  return low;
}

// Where a chunk begins, of a sequence that begins at `begin`.
__device__ __forceinline__ int start_of(int chunk, int sequence, int begin, int run) {
  return begin + (chunk - begin / run - sequence) * run;
}
