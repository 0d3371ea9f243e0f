// Vectors of the widest registers of the ISA that this translation unit is compiled for, through the compiler's vector
// extensions: one source for every ISA. Only the half-precision conversions need intrinsics.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../../attention_params.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#define PREFIX_KERNELS_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct SimdTypes;
template <>
struct SimdTypes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Uint __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 2)));  // 16 bits per lane
  static constexpr int kMantissaBits = 23;
  static constexpr float kRoundShift = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kMinExp = -87.3f;           // exp of a smaller number would be subnormal
};
template <>
struct SimdTypes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Uint __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 4)));
  static constexpr int kMantissaBits = 52;
  static constexpr double kRoundShift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMinExp = -708.3;
};

template <class T>
using Vec = typename SimdTypes<T>::Vec;
template <class T>
using Int = typename SimdTypes<T>::Int;
template <class T>
using LaneIndex = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;  // type of an element of Int<T>
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Rounds a count of elements up to whole vectors.
template <class T>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class V, class P>
PREFIX_KERNELS_INLINE V load_bits(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class T>
PREFIX_KERNELS_INLINE Vec<T> load(const T* p) {
  return load_bits<Vec<T>>(p);
}

template <class T>
PREFIX_KERNELS_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// Tells if a vector is a whole cache line, which stream() may write without reading it first.
inline constexpr bool kVectorIsLine = kVectorBytes == 64;

// Stores past the caches, to an aligned address. Other threads may read it after end_streams().
template <class T>
PREFIX_KERNELS_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#else
  store(p, v);
#endif
}

PREFIX_KERNELS_INLINE void end_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

template <class T>
PREFIX_KERNELS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
PREFIX_KERNELS_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Tells if a comparison held in some lane.
template <class T>
PREFIX_KERNELS_INLINE bool any_lane(Int<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask)) == 0;
#else
  constexpr int kWords = kVectorBytes / 8;
  uint64_t words[kWords], any = 0;
  std::memcpy(words, &mask, sizeof(words));
  for (int i = 0; i < kWords; ++i) any |= words[i];
  return any != 0;
#endif
}

template <class T>
PREFIX_KERNELS_INLINE T horizontal_sum(Vec<T> v) {
  constexpr int kN = kLanes<T>;
  Int<T> swap;
#pragma GCC unroll 4
  for (int half = kN / 2; half > 0; half /= 2) {
    for (int i = 0; i < kN; ++i) swap[i] = i ^ half;
    v += __builtin_shuffle(v, swap);
  }
  return v[0];
}

template <class T>
PREFIX_KERNELS_INLINE T horizontal_max(Vec<T> v) {
  constexpr int kN = kLanes<T>;
  Int<T> swap;
#pragma GCC unroll 4
  for (int half = kN / 2; half > 0; half /= 2) {
    for (int i = 0; i < kN; ++i) swap[i] = i ^ half;
    v = maximum<T>(v, __builtin_shuffle(v, swap));
  }
  return v[0];
}

typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));

// Products of the low 32 bits of the lanes.
PREFIX_KERNELS_INLINE Wide multiply_low_halves(Wide a, Wide b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  constexpr uint64_t kLow = 0xffffffffu;
  return (a & kLow) * (b & kLow);
#endif
}

// ---- one element -------------------------------------------------------------------------------------------------

PREFIX_KERNELS_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

PREFIX_KERNELS_INLINE float to_float(Half x) {
  // Shift the exponent into place and rescale by 2^112, which also normalises subnormals; infinity and NaN apart.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  uint32_t bits = magnitude;
  float f;
  if (magnitude >= 0x0f800000u) {
    bits = magnitude | 0x7f800000u;
    std::memcpy(&f, &bits, sizeof(f));
  } else {
    std::memcpy(&f, &bits, sizeof(f));
    f *= 5.192296858534828e33f;
  }
  return (x.bits & 0x8000) != 0 ? -f : f;
}

PREFIX_KERNELS_INLINE float to_float(float x) { return x; }
PREFIX_KERNELS_INLINE double to_float(double x) { return x; }

template <class Dst>
PREFIX_KERNELS_INLINE Dst from_float(double x);

template <>
PREFIX_KERNELS_INLINE double from_float<double>(double x) {
  return x;
}
template <>
PREFIX_KERNELS_INLINE float from_float<float>(double x) {
  return static_cast<float>(x);
}
template <>
PREFIX_KERNELS_INLINE BFloat16 from_float<BFloat16>(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  if (f != f) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
PREFIX_KERNELS_INLINE Half from_float<Half>(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (bits < 0x38800000) {                                                // subnormal: let a float addition round
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13))};
}

// ---- one vector of any storage type ------------------------------------------------------------------------------

template <class T, class Src>
PREFIX_KERNELS_INLINE Vec<T> load_as(const Src* p) {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(to_float(p[i]));
  return v;
}

template <class T, class Dst>
PREFIX_KERNELS_INLINE void store_as(Dst* p, Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) p[i] = from_float<Dst>(v[i]);
}

template <>
PREFIX_KERNELS_INLINE Vec<float> load_as<float, float>(const float* p) {
  return load(p);
}
template <>
PREFIX_KERNELS_INLINE Vec<double> load_as<double, double>(const double* p) {
  return load(p);
}
template <>
PREFIX_KERNELS_INLINE void store_as<float, float>(float* p, Vec<float> v) {
  store(p, v);
}
template <>
PREFIX_KERNELS_INLINE void store_as<double, double>(double* p, Vec<double> v) {
  store(p, v);
}

template <>
PREFIX_KERNELS_INLINE Vec<float> load_as<float, BFloat16>(const BFloat16* p) {
  using Uint = SimdTypes<float>::Uint;
  const Uint bits = __builtin_convertvector(load_bits<SimdTypes<float>::Packed>(p), Uint) << 16;
  return reinterpret_cast<Vec<float>>(bits);
}
template <>
PREFIX_KERNELS_INLINE void store_as<float, BFloat16>(BFloat16* p, Vec<float> v) {
  using Uint = SimdTypes<float>::Uint;
  const Uint bits = reinterpret_cast<Uint>(v);
  const Uint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Uint quiet_nan = Uint{} + 0x7fc0;
  const auto packed = __builtin_convertvector(v != v ? quiet_nan : rounded, SimdTypes<float>::Packed);
  std::memcpy(p, &packed, sizeof(packed));
}

#if defined(__AVX512F__)
template <>
PREFIX_KERNELS_INLINE Vec<float> load_as<float, Half>(const Half* p) {
  return (Vec<float>)_mm512_cvtph_ps(load_bits<__m256i>(p));
}
template <>
PREFIX_KERNELS_INLINE void store_as<float, Half>(Half* p, Vec<float> v) {
  const __m256i packed = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &packed, sizeof(packed));
}
#elif defined(__F16C__)
template <>
PREFIX_KERNELS_INLINE Vec<float> load_as<float, Half>(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(load_bits<__m128i>(p));
}
template <>
PREFIX_KERNELS_INLINE void store_as<float, Half>(Half* p, Vec<float> v) {
  const __m128i packed = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &packed, sizeof(packed));
}
#endif

// Calls f with a null pointer of the storage type that dtype names.
template <class F>
PREFIX_KERNELS_INLINE void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      f(static_cast<double*>(nullptr));
      break;
    case DType::kFloat32:
      f(static_cast<float*>(nullptr));
      break;
    case DType::kBFloat16:
      f(static_cast<BFloat16*>(nullptr));
      break;
    case DType::kFloat16:
      f(static_cast<Half*>(nullptr));
      break;
  }
}

template <class T>
inline constexpr DType kComputeDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// ---- functions ---------------------------------------------------------------------------------------------------

// A polynomial for 2^f, |f| <= 1/2, with constant term 1.
template <class T>
struct Exp2Series;

template <>
struct Exp2Series<float> {
  static constexpr int kDegree = 6;
  // Fitted to the least largest relative error (2e-9 before the coefficients are rounded).
  float coefficient[kDegree + 1] = {1.0f,           0x1.62e430p-1f,  0x1.ebfbdcp-3f, 0x1.c6aee8p-5f,
                                    0x1.3b2d4cp-7f, 0x1.5f3e52p-10f, 0x1.41fbbcp-13f};
};

template <>
struct Exp2Series<double> {
  static constexpr int kDegree = 14;
  double coefficient[kDegree + 1] = {};  // the Taylor series (ln 2)^k / k!, exact to the last bit at this degree

  constexpr Exp2Series() {
    double term = 1.0;
    for (int k = 0; k <= kDegree; ++k) {
      coefficient[k] = term;
      term *= 0.693147180559945309417 / (k + 1);
    }
  }
};

template <class T>
inline constexpr Exp2Series<T> kExp2Series{};

// e^x = 2^n 2^f with n an integer and |f| <= 1/2. One product of x with log2(e) serves: it is wrong by as much as the
// rounding of x itself.
template <class T>
struct ReducedExp {
  Vec<T> f;
  Int<T> exponent;  // n, shifted into the place of a float's exponent

  explicit PREFIX_KERNELS_INLINE ReducedExp(Vec<T> x) {
    using S = SimdTypes<T>;
    constexpr T kLog2e = static_cast<T>(1.4426950408889634073599246810);
    const Vec<T> shifted = x * kLog2e + S::kRoundShift;
    f = x * kLog2e - (shifted - S::kRoundShift);
    exponent = reinterpret_cast<Int<T>>(shifted) << S::kMantissaBits;
  }

  // The polynomial without its terms below f^first, over f^first.
  template <int kFirst>
  PREFIX_KERNELS_INLINE Vec<T> series() const {
    constexpr int kDegree = Exp2Series<T>::kDegree;
    Vec<T> p = broadcast<T>(kExp2Series<T>.coefficient[kDegree]);
#pragma GCC unroll 16
    for (int k = kDegree - 1; k >= kFirst; --k) p = p * f + kExp2Series<T>.coefficient[k];
    return p;
  }
};

// e^x for x below the largest exponent; exactly 0 where the result would be subnormal, and for -infinity.
template <class T>
PREFIX_KERNELS_INLINE Vec<T> exp(Vec<T> x) {
  const ReducedExp<T> r(x);
  const Int<T> scaled = reinterpret_cast<Int<T>>(r.template series<0>()) + r.exponent;
  return x < SimdTypes<T>::kMinExp ? Vec<T>{} : reinterpret_cast<Vec<T>>(scaled);
}

#if defined(__AVX512DQ__)
// e^x = 2^floor(y) 2^f with y = x log2(e) and 0 <= f < 1; f and the scaling are an instruction each.
template <>
PREFIX_KERNELS_INLINE Vec<float> exp<float>(Vec<float> x) {
  constexpr float kLog2e = 1.4426950408889634073599246810f;
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  // 2^f as in Exp2Series, but for [0, 1); the largest relative error is again 2e-9.
  constexpr float kCoefficients[] = {
      0x1.c4456ep-13f, 0x1.47373ap-10f, 0x1.3cfd82p-7f, 0x1.c68af6p-5f, 0x1.ebfd3ap-3f, 0x1.62e42cp-1f, 1.0f};
  const Vec<float> y = x * kLog2e;
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)y, kFloor);
  Vec<float> p = broadcast(kCoefficients[0]);
#pragma GCC unroll 6
  for (int k = 1; k < 7; ++k) p = p * f + kCoefficients[k];
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(SimdTypes<float>::kMinExp), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)y);
}
#endif

// The natural logarithm of x, at least the least normal number; infinity and NaN stay. With x = 2^n m and
// t = (m - 1) / (m + 1), log m = 2 (t + t^3/3 + t^5/5 + ...), |t| < 0.172.
template <class T>
PREFIX_KERNELS_INLINE Vec<T> log(Vec<T> x) {
  using Bits = LaneIndex<T>;
  constexpr int kMantissaBits = SimdTypes<T>::kMantissaBits;
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 11;
  constexpr T kSqrtHalf = static_cast<T>(0.70710678118654752440), kLn2 = static_cast<T>(0.69314718055994530942);
  Bits origin;
  std::memcpy(&origin, &kSqrtHalf, sizeof(origin));
  const Int<T> bits = reinterpret_cast<Int<T>>(x) - origin;
  const Int<T> exponent = bits >> kMantissaBits;
  const Vec<T> m = reinterpret_cast<Vec<T>>((bits & ((Bits{1} << kMantissaBits) - 1)) + origin);
  const Vec<T> t = (m - 1) / (m + 1), square = t * t;
  Vec<T> series = broadcast<T>(T(2) / (2 * kTerms - 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k > 0; --k) series = series * square + T(2) / (2 * k - 1);
  const Vec<T> result = __builtin_convertvector(exponent, Vec<T>) * kLn2 + series * t;
  return x < std::numeric_limits<T>::infinity() ? result : x;
}

// tanh through expm1 of twice the magnitude, with full relative accuracy near zero.
template <class T>
PREFIX_KERNELS_INLINE Vec<T> tanh(Vec<T> x) {
  constexpr T kSaturated = 40;  // e^-40 is below the last bit of 1 in either type
  const Vec<T> magnitude = x < 0 ? -x : x;
  const Vec<T> doubled = magnitude + magnitude;
  const ReducedExp<T> r(doubled > kSaturated ? broadcast<T>(kSaturated) : doubled);
  const Vec<T> power = reinterpret_cast<Vec<T>>(reinterpret_cast<Int<T>>(broadcast<T>(1)) + r.exponent);
  const Vec<T> expm1 = power * (r.template series<1>() * r.f) + (power - 1);
  const Vec<T> t = expm1 / (expm1 + 2);
  const Vec<T> signed_t = x < 0 ? -t : t;
  return x != x ? x : signed_t;
}

// Transposes kLanes x kLanes elements held as rows, in place: for each power of two, rows i and i + kBlock exchange the
// off-diagonal blocks of kBlock lanes.
template <class T, int kBlock = kLanes<T> / 2>
PREFIX_KERNELS_INLINE void transpose(Vec<T> (&row)[kLanes<T>]) {
  constexpr int kN = kLanes<T>;
  if constexpr (kBlock > 0) {
    Int<T> upper, lower;
    for (int l = 0; l < kN; ++l) {
      const bool second = (l & kBlock) != 0;
      upper[l] = second ? kN + l - kBlock : l;
      lower[l] = second ? kN + l : l + kBlock;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) {
      if ((i & kBlock) != 0) continue;
      const Vec<T> a = row[i], b = row[i + kBlock];
      row[i] = __builtin_shuffle(a, b, upper);
      row[i + kBlock] = __builtin_shuffle(a, b, lower);
    }
    transpose<T, kBlock / 2>(row);
  }
}

// Lane i of the result is the sum over the lanes of row[i]. For each power of two, rows i and i + kBlock are added into
// one, in which blocks of kBlock lanes of either alternate.
template <class T, int kBlock = kLanes<T> / 2>
PREFIX_KERNELS_INLINE Vec<T> lane_sums(Vec<T> (&row)[kLanes<T>]) {
  constexpr int kN = kLanes<T>;
  if constexpr (kBlock == 0) {
    return row[0];
  } else {
    Int<T> upper, lower;
    for (int l = 0; l < kN; ++l) {
      const bool second = (l & kBlock) != 0;
      upper[l] = second ? kN + l - kBlock : l;
      lower[l] = second ? kN + l : l + kBlock;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i)
      row[i] = __builtin_shuffle(row[i], row[i + kBlock], upper) + __builtin_shuffle(row[i], row[i + kBlock], lower);
    return lane_sums<T, kBlock / 2>(row);
  }
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
