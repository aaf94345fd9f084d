// One SIMD vector of the tier's width, for float and double, on the compiler's vector extension: + - * / and
// comparisons are operators, mask ? a : b selects, a * b + c contracts to one FMA where the tier has it. What the
// extension lacks (16-bit floats, masked tails, exp, sums across lanes) is here. No include guard: for_each_tier.h
// includes this once per tier.

typedef float FloatVec __attribute__((vector_size(FASTNN_VECTOR_BYTES)));
typedef double DoubleVec __attribute__((vector_size(FASTNN_VECTOR_BYTES)));
typedef int32_t Int32Vec __attribute__((vector_size(FASTNN_VECTOR_BYTES)));
typedef uint32_t UInt32Vec __attribute__((vector_size(FASTNN_VECTOR_BYTES)));
typedef int64_t Int64Vec __attribute__((vector_size(FASTNN_VECTOR_BYTES)));
typedef uint16_t HalfBitsVec __attribute__((vector_size(FASTNN_VECTOR_BYTES / 2)));

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  using type = FloatVec;
  using mask = Int32Vec;
  using mask_lane = int32_t;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
  using mask = Int64Vec;
  using mask_lane = int64_t;
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
using Mask = typename VecOf<A>::mask;
template <class A>
using MaskLane = typename VecOf<A>::mask_lane;

// Lanes of a vector of accumulators A.
template <class A>
constexpr int kLanes = FASTNN_VECTOR_BYTES / int(sizeof(A));

template <class A>
FASTNN_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};  // x - 0 keeps -0; folds to one broadcast
}

FASTNN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr FASTNN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTNN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- loads and stores: T in memory, Accumulator<T> in registers ----

FASTNN_INLINE FloatVec load(const float* p) {
  FloatVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTNN_INLINE DoubleVec load(const double* p) {
  DoubleVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
#if FASTNN_VECTOR_BYTES == 64
FASTNN_INLINE FloatVec widen(__m256i bits, bf16) {
  return (FloatVec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
FASTNN_INLINE FloatVec widen(__m256i bits, f16) { return (FloatVec)_mm512_cvtph_ps(bits); }
#endif
FASTNN_INLINE FloatVec load(const bf16* p) {
#if FASTNN_VECTOR_BYTES == 64
  return widen(_mm256_loadu_si256((const __m256i*)p), bf16{});
#elif FASTNN_VECTOR_BYTES == 32
  return (FloatVec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  HalfBitsVec bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (FloatVec)(__builtin_convertvector(bits, UInt32Vec) << 16);
#endif
}
FASTNN_INLINE FloatVec load(const f16* p) {
#if FASTNN_VECTOR_BYTES == 64
  return widen(_mm256_loadu_si256((const __m256i*)p), f16{});
#elif FASTNN_VECTOR_BYTES == 32
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  FloatVec v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_accumulator(p[i]);
  return v;
#endif
}

FASTNN_INLINE void store(float* p, FloatVec v) { __builtin_memcpy(p, &v, sizeof v); }
FASTNN_INLINE void store(double* p, DoubleVec v) { __builtin_memcpy(p, &v, sizeof v); }
FASTNN_INLINE void store(bf16* p, FloatVec v) {
#if FASTNN_BF16_PRODUCTS
  // Subnormals become 0, as in the products.
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const UInt32Vec bits = (UInt32Vec)v;
  const UInt32Vec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const UInt32Vec nan = bits >> 16 | 0x40;
  const UInt32Vec word = (v == v) ? rounded : nan;
#if FASTNN_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p,
                   _mm_packus_epi32(_mm256_castsi256_si128((__m256i)word), _mm256_extracti128_si256((__m256i)word, 1)));
#else
  const HalfBitsVec half = __builtin_convertvector(word, HalfBitsVec);
  __builtin_memcpy(p, &half, sizeof half);
#endif
#endif
}
FASTNN_INLINE void store(f16* p, FloatVec v) {
#if FASTNN_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FASTNN_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_accumulator<f16>(v[i]);
#endif
}

// Integers of 0 to 255, a byte each.
FASTNN_INLINE void store_bytes(uint8_t* p, Int32Vec v) {
#if FASTNN_VECTOR_BYTES == 64
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif FASTNN_VECTOR_BYTES == 32
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = uint8_t(v[i]);
#endif
}
FASTNN_INLINE void store_bytes(uint8_t* p, Int64Vec v) {
  for (int i = 0; i < kLanes<double>; ++i) p[i] = uint8_t(v[i]);
}
// The first n (0 <= n <= lanes) of them.
FASTNN_INLINE void store_bytes_n(uint8_t* p, Int32Vec v, int n) {
  if (n == kLanes<float>) return store_bytes(p, v);
#if FASTNN_VECTOR_BYTES == 64
  _mm_mask_storeu_epi8(p, __mmask16((1u << n) - 1), _mm512_cvtepi32_epi8((__m512i)v));
#else
  uint8_t bytes[kLanes<float>];
  store_bytes(bytes, v);
  for (int i = 0; i < n; ++i) p[i] = bytes[i];
#endif
}
FASTNN_INLINE void store_bytes_n(uint8_t* p, Int64Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = uint8_t(v[i]);
}

// Likewise, in the lanes of a vector of A; the other lanes are `others`.
template <class A>
FASTNN_INLINE Mask<A> load_bytes_n(const uint8_t* p, int n, uint8_t others) {
  constexpr int L = kLanes<A>;
#if FASTNN_VECTOR_BYTES == 64
  if constexpr (L == 16)
    return (Int32Vec)_mm512_cvtepu8_epi32(
        _mm_mask_loadu_epi8(_mm_set1_epi8(char(others)), __mmask16((1u << n) - 1), p));
#endif
  typedef uint8_t Bytes __attribute__((vector_size(L)));
  uint8_t padded[L];
  if (n < L)
    for (int i = 0; i < L; ++i) padded[i] = i < n ? p[i] : others;
  Bytes bytes;
  __builtin_memcpy(&bytes, n < L ? padded : p, L);
  return __builtin_convertvector(bytes, Mask<A>);
}

// The first n (0 <= n <= lanes) elements; the other lanes are zero, and their memory is not touched.
#if FASTNN_VECTOR_BYTES == 64
FASTNN_INLINE FloatVec load_n(const float* p, int n) {
  return (FloatVec)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
FASTNN_INLINE DoubleVec load_n(const double* p, int n) {
  return (DoubleVec)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
FASTNN_INLINE void store_n(float* p, FloatVec v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
FASTNN_INLINE void store_n(double* p, DoubleVec v, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
FASTNN_INLINE FloatVec load_n(const bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p), bf16{});
}
FASTNN_INLINE FloatVec load_n(const f16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p), f16{});
}
#elif FASTNN_VECTOR_BYTES == 32
FASTNN_INLINE __m256i first_lanes_32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTNN_INLINE __m256i first_lanes_64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTNN_INLINE FloatVec load_n(const float* p, int n) { return (FloatVec)_mm256_maskload_ps(p, first_lanes_32(n)); }
FASTNN_INLINE DoubleVec load_n(const double* p, int n) { return (DoubleVec)_mm256_maskload_pd(p, first_lanes_64(n)); }
// In pieces of 4, 2 and 1: AVX's masked store is microcoded on AMD processors.
FASTNN_INLINE void store_n(float* p, FloatVec v, int n) {
  if (n == 8) return store(p, v);
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1), p += 4;
  }
  if (n & 2) {
    _mm_storel_pi((__m64*)p, part);
    part = _mm_movehl_ps(part, part), p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
FASTNN_INLINE void store_n(double* p, DoubleVec v, int n) {
  if (n == 4) return store(p, v);
  __m128d part = _mm256_castpd256_pd128((__m256d)v);
  if (n & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd((__m256d)v, 1), p += 2;
  }
  if (n & 1) _mm_store_sd(p, part);
}
#endif

// Tiers and types without a masked access go through a vector on the stack.
template <class T>
FASTNN_INLINE Vec<Accumulator<T>> load_n(const T* p, int n) {
  T lanes[kLanes<Accumulator<T>>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
FASTNN_INLINE void store_n(T* p, Vec<Accumulator<T>> v, int n) {
  T lanes[kLanes<Accumulator<T>>];
  store(lanes, v);
#if FASTNN_VECTOR_BYTES == 64
  __m256i bits;
  __builtin_memcpy(&bits, lanes, sizeof bits);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), bits);
#else
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// The first `lanes` of a vector; stored are all of them where that is more than there are, and none where it is less.
template <class T>
FASTNN_INLINE Vec<Accumulator<T>> load_lanes(const T* p, int lanes) {
  return lanes == kLanes<Accumulator<T>> ? load(p) : load_n(p, lanes);
}
template <class T>
FASTNN_INLINE void store_lanes(T* p, Vec<Accumulator<T>> v, int64_t lanes) {
  if (lanes >= kLanes<Accumulator<T>>)
    store(p, v);
  else if (lanes > 0)
    store_n(p, v, int(lanes));
}
// Every second element, of the first `lanes` lanes. The second vector begins with the first one's last element, to end
// at the last lane's: memory may end there.
template <class T>
FASTNN_INLINE Vec<Accumulator<T>> load_even(const T* p, int lanes) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const int elements = 2 * lanes - 1;
  const Vec<A> low = load_lanes(p, int(least(L, elements)));
  const Vec<A> high = elements < L ? low : load_lanes(p + L - 1, elements - (L - 1));
  Mask<A> even;
  for (int i = 0; i < L; ++i) even[i] = 2 * i < L ? 2 * i : 2 * i + 1;
  return __builtin_shuffle(low, high, even);
}

// A gradient's lanes; where the output of a ReLU at `relu`, unless that is null, is not positive, zero.
template <class T>
FASTNN_INLINE Vec<Accumulator<T>> load_masked(const T* p, const T* relu, int lanes) {
  const Vec<Accumulator<T>> value = load_lanes(p, lanes), zero{};
  return relu ? (load_lanes(relu, lanes) <= zero ? zero : value) : value;
}

// ---- operands: what a convolution multiplies, term by term of its sums ----

// Two terms' elements, whose products one instruction adds to a float.
struct Bf16Pair {
  bf16 even, odd;
};
template <>
struct VecOf<Bf16Pair> {
  using type = UInt32Vec;
  using mask = Int32Vec;
};

template <class T>
struct OperandOf {
  using type = Accumulator<T>;
};
#if FASTNN_BF16_PRODUCTS
template <>
struct OperandOf<bf16> {
  using type = Bf16Pair;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

// Terms in an operand P, and operands of so many terms; the last one of an odd number has a zero.
template <class P>
constexpr int kTermsOf = 1;
template <>
constexpr int kTermsOf<Bf16Pair> = 2;
template <class P>
FASTNN_INLINE int64_t operands(int64_t terms) {
  return ceil_div(terms, kTermsOf<P>);
}

template <class V>
FASTNN_INLINE V multiply_add(V a, V b, V sum) {
  return a * b + sum;
}

FASTNN_INLINE UInt32Vec load(const Bf16Pair* p) {
  UInt32Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTNN_INLINE void store(Bf16Pair* p, UInt32Vec v) { __builtin_memcpy(p, &v, sizeof v); }
FASTNN_INLINE UInt32Vec splat(Bf16Pair value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits + UInt32Vec{};
}
#if FASTNN_VECTOR_BYTES == 64
FASTNN_INLINE void store_lanes(Bf16Pair* p, UInt32Vec v, int64_t lanes) {
  store_lanes(reinterpret_cast<float*>(p), (FloatVec)v, lanes);
}
#endif
#if FASTNN_BF16_PRODUCTS
// Subnormal elements, products and sums count as 0.
FASTNN_INLINE FloatVec multiply_add(UInt32Vec a, UInt32Vec b, FloatVec sum) {
  return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

FASTNN_INLINE UInt32Vec pairs(FloatVec even, FloatVec odd) {
  // `odd`'s low half is zero too, if it is a term: what is packed behind the last one need not be.
  return (UInt32Vec)even >> 16 | ((UInt32Vec)odd & 0xffff0000);
}

template <class P>
FASTNN_INLINE Vec<P> ones_of() {
  if constexpr (kTermsOf<P> == 2)
    return pairs(splat(1.0f), splat(1.0f));
  else
    return splat(P(1));
}

// Operands without their second terms, where there is none; of one term there is.
FASTNN_INLINE UInt32Vec first_term(UInt32Vec v) { return v & 0xffff; }
template <class V>
FASTNN_INLINE V first_term(V v) {
  return v;
}

// The operand of terms `step` apart from p on, of which `count` are left; where the output of a ReLU at `relu`,
// unless that is null, is not positive, zero.
template <class T, class P>
FASTNN_INLINE P operand(const T* p, int64_t step, const T* relu, int64_t relu_step, int64_t count) {
  const bool first = count > 0 && !(relu && to_accumulator(relu[0]) <= 0);
  if constexpr (kTermsOf<P> == 2) {
    const bool second = count > 1 && !(relu && to_accumulator(relu[relu_step]) <= 0);
    return {first ? p[0] : T{}, second ? p[step] : T{}};
  } else {
    return first ? to_accumulator(p[0]) : P{};
  }
}

// A vector of them: its lanes are neighbours.
template <class T, class P>
FASTNN_INLINE Vec<P> load_operands(const T* p, int64_t step, const T* relu, int64_t relu_step, int64_t count,
                                   int lanes) {
  const Vec<Accumulator<T>> even = load_masked(p, relu, lanes);
  if constexpr (kTermsOf<P> == 2)
    return pairs(even, count > 1 ? load_masked(p + step, relu ? relu + relu_step : nullptr, lanes) : FloatVec{});
  else
    return even;
}

// A vector whose terms are all neighbours, `count` of them at the most.
template <class T, class P>
FASTNN_INLINE Vec<P> load_neighbours(const T* p, const T* relu, int count) {
#if FASTNN_BF16_PRODUCTS
  if constexpr (kTermsOf<P> == 2) {
    const __mmask32 first = __mmask32((uint64_t(1) << count) - 1);
    const __m512i v = _mm512_maskz_loadu_epi16(first, p);
    if (!relu) return (UInt32Vec)v;
    const __m512i y = _mm512_maskz_loadu_epi16(first, relu), zero = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_and_si512(y, _mm512_set1_epi16(0x7fff));
    const __mmask32 nan = _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(0x7f80));
    return (UInt32Vec)_mm512_maskz_mov_epi16(_mm512_cmpgt_epi16_mask(y, zero) | nan, v);
  } else
#endif
    return load_masked(p, relu, count);
}

// ---- arithmetic ----

// Lanewise maximum; a NaN in b is kept, one in a is not (the operand order of x86 max).
template <class V>
FASTNN_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FASTNN_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

#if FASTNN_VECTOR_BYTES == 64
FASTNN_INLINE FloatVec max(FloatVec a, FloatVec b) { return (FloatVec)_mm512_max_ps((__m512)a, (__m512)b); }
FASTNN_INLINE DoubleVec max(DoubleVec a, DoubleVec b) { return (DoubleVec)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif FASTNN_VECTOR_BYTES == 32
FASTNN_INLINE FloatVec max(FloatVec a, FloatVec b) { return (FloatVec)_mm256_max_ps((__m256)a, (__m256)b); }
FASTNN_INLINE DoubleVec max(DoubleVec a, DoubleVec b) { return (DoubleVec)_mm256_max_pd((__m256d)a, (__m256d)b); }
#endif

// Transposes kLanes<A> vectors in place: swaps ever smaller off-diagonal blocks.
template <class A, int half, int count = kLanes<A>>
FASTNN_INLINE void swap_blocks(Vec<A>* rows) {
  constexpr int n = kLanes<A>;
  Mask<A> low, high;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    low[i] = (i & half) ? i - half + n : i;
    high[i] = (i & half) ? i + n : i + half;
  }
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i)
    if (!(i & half)) {
      const Vec<A> a = rows[i], b = rows[i + half];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + half] = __builtin_shuffle(a, b, high);
    }
}
template <class A>
FASTNN_INLINE void transpose(Vec<A>* rows) {
  if constexpr (kLanes<A> > 8) swap_blocks<A, 8>(rows);
  if constexpr (kLanes<A> > 4) swap_blocks<A, 4>(rows);
  if constexpr (kLanes<A> > 2) swap_blocks<A, 2>(rows);
  swap_blocks<A, 1>(rows);
}

// C vectors of pixels, C channels side by side, to a vector a channel, in place; join: and back. In C - 1 permutations
// a vector, where a transpose of squares would be mostly empty.
template <class A, int C, bool join>
FASTNN_INLINE void regroup_channels(Vec<A>* rows) {
  constexpr int L = kLanes<A>;
  Vec<A> results[C];
#pragma GCC unroll 4
  for (int r = 0; r < C; ++r) {
    results[r] = rows[0];
#pragma GCC unroll 4
    for (int k = 1; k < C; ++k) {  // what the first k + 1 vectors have is in place then
      Mask<A> pick;
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const int at = join ? r * L + i : i * C + r, row = join ? at % C : at / L, lane = join ? at / C : at % L;
        pick[i] = row == k ? L + lane : k == 1 ? lane : i;
      }
      results[r] = __builtin_shuffle(results[r], rows[k], pick);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < C; ++r) rows[r] = results[r];
}

// `cols` pixels of a row as vectors of `lanes` channels. What lies `ahead` is prefetched: a run reads less of a row
// than a hardware prefetcher needs to see.
template <class T>
FASTNN_INLINE void read_vectors(const T* p, int64_t stride_c, int64_t stride_w, int lanes, int cols, int64_t ahead,
                                Vec<Accumulator<T>>* out) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  if (stride_c == 1) {
    for (int j = 0; j < cols; ++j) {
      __builtin_prefetch(p + j * stride_w + ahead);
      out[j] = load_lanes(p + j * stride_w, lanes);
    }
  } else if (stride_w == 1) {
    for (int i = 0; i < lanes; ++i) __builtin_prefetch(p + i * stride_c + ahead);
    for (int i = 0; i < L; ++i) out[i] = i < lanes ? load_lanes(p + i * stride_c, cols) : Vec<A>{};
    transpose<A>(out);
  } else {
    for (int j = 0; j < cols; ++j) {
      A pixel[L] = {};
      for (int i = 0; i < lanes; ++i) pixel[i] = to_accumulator(p[i * stride_c + j * stride_w]);
      out[j] = load(pixel);
    }
  }
}

// The same of a gradient; where the output of a ReLU at `relu`, unless that is null, is not positive, zero.
template <class T>
FASTNN_INLINE void read_masked_vectors(const T* p, int64_t stride_c, int64_t stride_w, const T* relu, int64_t relu_c,
                                       int64_t relu_w, int lanes, int cols, int64_t ahead, int64_t relu_ahead,
                                       Vec<Accumulator<T>>* out) {
  using A = Accumulator<T>;
  read_vectors(p, stride_c, stride_w, lanes, cols, ahead, out);
  if (!relu) return;
  Vec<A> outputs[kLanes<A>];
  read_vectors(relu, relu_c, relu_w, lanes, cols, relu_ahead, outputs);
  for (int i = 0; i < cols; ++i) out[i] = outputs[i] <= Vec<A>{} ? Vec<A>{} : out[i];
}

// `count` pixels, vectors of `lanes` channels that are `pitch` apart, in a result's layout: channels or columns are
// neighbours; of columns, the next line of each channel is prefetched, for a next row. May read pixels past them, up to
// a vector's lanes.
template <class T>
void write_vectors(const Accumulator<T>* pixels, int64_t pitch, int64_t count, int lanes, T* to, int64_t stride_c,
                   int64_t stride_w) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, kNextLine = 128 / sizeof(T);
  if (stride_c == 1) {
    for (int64_t i = 0; i < count; ++i) store_lanes(to + i * stride_w, load(pixels + i * pitch), lanes);
    return;
  }
  for (int64_t i = 0; i < count; i += L) {
    Vec<A> square[L];
    for (int64_t j = 0; j < L; ++j) square[j] = load(pixels + (i + j) * pitch);
    transpose<A>(square);
    for (int j = 0; j < lanes; ++j) {
      __builtin_prefetch(to + j * stride_c + i + kNextLine, 1);
      store_lanes(to + j * stride_c + i, square[j], count - i);
    }
  }
}

// All ones in the first n (0 <= n <= lanes) lanes, zero in the others.
template <class A>
FASTNN_INLINE Mask<A> first_lanes(int n) {
  Mask<A> lane = {};
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < Mask<A>{} + n;
}

template <class A>
FASTNN_INLINE A sum_lanes_impl(Vec<A> v) {
  // Pairwise halves: a fixed order.
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    Mask<A> other{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) other[i] = i ^ half;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}
FASTNN_INLINE float sum_lanes(FloatVec v) { return sum_lanes_impl<float>(v); }
FASTNN_INLINE double sum_lanes(DoubleVec v) { return sum_lanes_impl<double>(v); }

// Whether no element is an inf or NaN.
template <class A>
bool all_finite(const A* p, int64_t count) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[4] = {};  // 0 unless an inf or NaN was multiplied by 0
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] += load(p + i + j * L) * A(0);
  for (; i < count; i += L) sum[0] += load_n(p + i, int(least(L, count - i))) * A(0);
  return sum_lanes(sum[0] + sum[1] + sum[2] + sum[3]) == 0;
}

template <class A>
FASTNN_INLINE A max_lanes_impl(Vec<A> v) {
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    Mask<A> other{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) other[i] = i ^ half;
    v = max(v, Vec<A>(__builtin_shuffle(v, other)));
  }
  return v[0];
}
FASTNN_INLINE float max_lanes(FloatVec v) { return max_lanes_impl<float>(v); }
FASTNN_INLINE double max_lanes(DoubleVec v) { return max_lanes_impl<double>(v); }

FASTNN_INLINE FloatVec sqrt(FloatVec v) {
#if FASTNN_VECTOR_BYTES == 64
  return (FloatVec)_mm512_sqrt_ps((__m512)v);
#elif FASTNN_VECTOR_BYTES == 32
  return (FloatVec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
FASTNN_INLINE DoubleVec sqrt(DoubleVec v) {
#if FASTNN_VECTOR_BYTES == 64
  return (DoubleVec)_mm512_sqrt_pd((__m512d)v);
#elif FASTNN_VECTOR_BYTES == 32
  return (DoubleVec)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// e^r, where x = n ln2 + r with integer n and |r| <= ln2/2 (Cody-Waite reduction), by a degree-6 polynomial; e^x is
// that times 2^n, to about 1 ulp. `round` is 0x1.8p23 plus any small integer: adding it rounds to integers, and leaves
// n plus that integer in the low bits of `shifted`.
FASTNN_INLINE FloatVec exp_reduced(FloatVec x, float round, FloatVec* shifted) {
  *shifted = x * 0x1.715476p+0f + round;
  const FloatVec n = *shifted - round;
  FloatVec r = n * -0x1.62e400p-1f + x;
  r = n * -0x1.7f7d1cp-20f + r;
  FloatVec p = r * 0x1.6850e4p-10f + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  return (p * r) * r + r + 1.0f;
}

// e^x for every float. Overflow gives inf, underflow 0 (through the subnormals: the scale is applied in two halves),
// NaN stays NaN.
FASTNN_INLINE FloatVec exp(FloatVec x) {
  FloatVec shifted;
  const FloatVec p = exp_reduced(min(max(x, splat(-104.0f)), splat(89.0f)), 0x1.8p23f, &shifted);
  const Int32Vec exponent = (Int32Vec)shifted - (Int32Vec)splat(0x1.8p23f);
  const Int32Vec half = exponent >> 1;
  const FloatVec scale1 = (FloatVec)((half + 127) << 23);
  const FloatVec scale2 = (FloatVec)((exponent - half + 127) << 23);
  return (x == x) ? p * scale1 * scale2 : x;
}
// e^x for x <= 0 (softmax), a third cheaper: 0 where it would be subnormal, NaN stays NaN.
FASTNN_INLINE FloatVec exp_nonpositive(FloatVec x) {
  FloatVec shifted;
  const FloatVec p = exp_reduced(x, 0x1.8p23f + 127, &shifted);
  const FloatVec scale = (FloatVec)((UInt32Vec)shifted << 23);
  return x < splat(-87.0f) ? FloatVec{} : p * scale;
}
// float64 is for checking gradients, not for speed: the C library's exp, lane by lane.
FASTNN_INLINE DoubleVec exp(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
FASTNN_INLINE DoubleVec exp_nonpositive(DoubleVec x) { return exp(x); }

// log x to about 1 ulp for normal x; inf and NaN stay, negative x gives NaN, and so does 0 and every subnormal:
// softmax's sums are at least 1. x = 2^n m with m in [sqrt(1/2), sqrt(2)), log m by a degree-9 polynomial.
FASTNN_INLINE FloatVec log(FloatVec x) {
  const Int32Vec bits = (Int32Vec)x - 0x3f3504f3;  // of sqrt(1/2)
  const FloatVec n = __builtin_convertvector(bits >> 23, FloatVec);
  const FloatVec m = (FloatVec)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  FloatVec p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const FloatVec square = m * m;
  p = (p * m) * square + n * -2.12194440e-4f;
  p = m + (p - square * 0.5f) + n * 0.693359375f;
  const FloatVec infinity = splat(__builtin_inff());
  return x < infinity ? (x >= splat(0x1p-126f) ? p : splat(__builtin_nanf(""))) : x;
}
FASTNN_INLINE DoubleVec log(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}
