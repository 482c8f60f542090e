// Numbers: narrow ones in memory, float32 in registers.
#pragma once
#include "instructions.cuh"

enum Kind { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

template <int KIND> struct Stored { using type = unsigned short; };
template <> struct Stored<FLOAT32> { using type = float; };

template <int KIND> __device__ __forceinline__ float widen(typename Stored<KIND>::type v) {
  if constexpr (KIND == FLOAT32) return v;
  else if constexpr (KIND == BFLOAT16) return __uint_as_float((unsigned)v << 16);
  else return from_half(v);
}

template <int KIND> __device__ __forceinline__ typename Stored<KIND>::type narrow(float f) {
  if constexpr (KIND == FLOAT32) return f;
  else if constexpr (KIND == BFLOAT16) return to_bfloat(f);
  else return to_half(f);
}

template <int KIND> __device__ __forceinline__ void put(void* p, long long i, float f) {
  static_cast<typename Stored<KIND>::type*>(p)[i] = narrow<KIND>(f);
}

// Four neighbours, as they lie in memory. They stay so until they are used: taking them apart waits for their loads.
template <int KIND> struct Four { uint2 bits; };
template <> struct Four<FLOAT32> { float4 bits; };

template <int KIND> __device__ __forceinline__ void widen4(const Four<KIND>& v, float (&f)[4]) {
  if constexpr (KIND == FLOAT32) {
    f[0] = v.bits.x, f[1] = v.bits.y, f[2] = v.bits.z, f[3] = v.bits.w;
  } else if constexpr (KIND == BFLOAT16) {
    f[0] = __uint_as_float(v.bits.x << 16), f[1] = __uint_as_float(v.bits.x & 0xffff0000u);
    f[2] = __uint_as_float(v.bits.y << 16), f[3] = __uint_as_float(v.bits.y & 0xffff0000u);
  } else {
    f[0] = widen<KIND>(v.bits.x), f[1] = widen<KIND>(v.bits.x >> 16);
    f[2] = widen<KIND>(v.bits.y), f[3] = widen<KIND>(v.bits.y >> 16);
  }
}

// One load of 8 or 16 bytes, aligned; or the first `count` of four numbers `stride` apart, and zeros.
template <int KIND> __device__ __forceinline__ Four<KIND> fetch4(const typename Stored<KIND>::type* p) {
  return *reinterpret_cast<const Four<KIND>*>(p);
}

template <int KIND>
__device__ __forceinline__ Four<KIND> fetch4(const typename Stored<KIND>::type* p, long long stride, int count) {
  typename Stored<KIND>::type v[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k < count) v[k] = p[k * stride];
  if constexpr (KIND == FLOAT32) return {make_float4(v[0], v[1], v[2], v[3])};
  else return {make_uint2(v[0] | (unsigned)v[1] << 16, v[2] | (unsigned)v[3] << 16)};
}

// Two neighbours from each of two places.
template <int KIND>
__device__ __forceinline__ Four<KIND> fetch2and2(const typename Stored<KIND>::type* p, const typename Stored<KIND>::type* q) {
  if constexpr (KIND == FLOAT32) {
    const float2 v = *reinterpret_cast<const float2*>(p), w = *reinterpret_cast<const float2*>(q);
    return {make_float4(v.x, v.y, w.x, w.y)};
  } else {
    return {make_uint2(*reinterpret_cast<const unsigned*>(p), *reinterpret_cast<const unsigned*>(q))};
  }
}

// The same into shared memory; with ADJACENT the copy goes its own way until `await_copies`.
template <int KIND, bool ADJACENT>
__device__ __forceinline__ void copy4(Four<KIND>* to, const typename Stored<KIND>::type* from, long long stride, int count) {
  if constexpr (ADJACENT) copy_async<sizeof(Four<KIND>)>(to, from, count > 0);
  else *to = fetch4<KIND>(from, stride, count);
}

template <int KIND> __device__ __forceinline__ Four<KIND> narrow4(const float (&f)[4]) {
  if constexpr (KIND == FLOAT32) return {make_float4(f[0], f[1], f[2], f[3])};
  else if constexpr (KIND == BFLOAT16) return {make_uint2(to_bfloats(f[0], f[1]), to_bfloats(f[2], f[3]))};
  else return {make_uint2(to_halves(f[0], f[1]), to_halves(f[2], f[3]))};
}

// One store of 8 or 16 bytes, aligned; or of the first `count` of the four.
template <int KIND> __device__ __forceinline__ void put4(void* p, long long i, const float (&f)[4], bool adjacent, int count) {
  typename Stored<KIND>::type* to = static_cast<typename Stored<KIND>::type*>(p) + i;
  if (adjacent) {
    const Four<KIND> v = narrow4<KIND>(f);  // whether it is stored or not: no branch for a store
    if (count > 0) *reinterpret_cast<Four<KIND>*>(to) = v;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < count) to[k] = narrow<KIND>(f[k]);
  }
}

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-LOG2E * x)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). log1p(e) / e on [0, 1] is a polynomial: the units that take logarithms are the
// ones that the scan's exponentials keep busy. Of degree 8 it is off by 2e-7 of it; of degree 4, for an x that came with
// 11 bits or fewer, by 6e-5.
template <bool OF_16_BITS = false> __device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(-LOG2E * fabsf(x));
  float p;
  if (OF_16_BITS) {
    p = 0.04134730249643326f;
    p = fmaf(p, e, -0.15742720663547516f);
    p = fmaf(p, e, 0.30630093812942505f);
    p = fmaf(p, e, -0.4969778060913086f);
    p = fmaf(p, e, 0.9999432563781738f);
  } else {
    p = 0.0052326880395412445f;
    p = fmaf(p, e, -0.029505213722586632f);
    p = fmaf(p, e, 0.07822591066360474f);
    p = fmaf(p, e, -0.13663242757320404f);
    p = fmaf(p, e, 0.19106005132198334f);
    p = fmaf(p, e, -0.2484298199415207f);
    p = fmaf(p, e, 0.3331909775733948f);
    p = fmaf(p, e, -0.4999949336051941f);
    p = fmaf(p, e, 0.9999999403953552f);
  }
  return fmaf(p, e, fmaxf(x, 0.f));
}
