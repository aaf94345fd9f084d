// Max-pooling over 2-D windows, and its gradient; forward leaves a byte an output element for backward, where native
// torch leaves an int64 index.
//
// Blocking: NCHW memory is pooled a vector of neighbouring outputs at a time; where windows are a stride of 2 apart,
// two loads are put together to one vector of every second element. channels_last memory has the channels as lanes, all
// that a window touches being vectors. Backward in channels_last gathers: every input pixel is written once, with the
// sum of the outputs that chose it. In NCHW, 2 x 2 windows side by side are spread from registers; others are added up
// in a plane of float32, which stays in the cache.
// Bytes: forward reads the input and writes the output and its codes, backward the other way about; a compare and two
// selects a window element. Memory-bound: at 2 x 2 in float32 8 of the 28 bytes that native moves an output are its
// index, here 1 of 21.
// Torch's conventions: of equal maxima the first is chosen, of several NaN the last.

// The elements [first, last) along one side of a window at `origin` that lie inside the input.
struct WindowSide {
  int64_t first, last;
};
FASTNN_INLINE WindowSide inside(int64_t origin, int64_t kernel, int64_t dilation, int64_t size) {
  return {origin < 0 ? ceil_div(-origin, dilation) : 0, least(kernel, ceil_div(size - origin, dilation))};
}

// Lane i, of the first `lanes`, is p[i * stride].
template <int stride, class T>
FASTNN_INLINE Vec<Accumulator<T>> load_strided(const T* p, int64_t any_stride, int lanes) {
  using A = Accumulator<T>;
  if constexpr (stride == 1) return load_lanes(p, lanes);
  if constexpr (stride == 2) return load_even(p, lanes);
  Vec<A> v{};
  for (int i = 0; i < lanes; ++i) v[i] = to_accumulator(p[i * any_stride]);
  return v;
}

// The largest so far and which element of its window it was, of a vector of outputs or of one.
template <class V, class M>
struct Largest {
  V value;
  M element;

  FASTNN_INLINE void offer(V other, int which) {
    const auto better = (other > value) | (other != other);
    value = better ? other : value;
    element = better ? M{} + which : element;
  }
};

template <class T>
FASTNN_INLINE void pool_one(const MaxPool2dShape& s, const T* plane, int64_t origin_y, WindowSide rows,
                            int64_t origin_x, T* y, uint8_t* code) {
  using A = Accumulator<T>;
  const WindowSide cols = inside(origin_x, s.kernel_w, s.dilation_w, s.in_w);
  Largest<A, int> largest{-A(__builtin_inf()), kPoolNone};
  if (rows.first < rows.last && cols.first < cols.last) largest.element = int(rows.first * s.kernel_w + cols.first);
  for (int64_t i = rows.first; i < rows.last; ++i)
    for (int64_t j = cols.first; j < cols.last; ++j)
      largest.offer(to_accumulator(plane[(origin_y + i * s.dilation_h) * s.in_w + origin_x + j * s.dilation_w]),
                    int(i * s.kernel_w + j));
  *y = from_accumulator<T>(largest.value);
  *code = uint8_t(largest.element);
}

// Whether windows of 2 x 2 lie a stride of 2 apart, without padding or one that hangs over the end.
FASTNN_INLINE bool side_by_side(const MaxPool2dShape& s) {
  return s.kernel_h == 2 && s.kernel_w == 2 && s.stride_h == 2 && s.stride_w == 2 && s.pad_h == 0 && s.pad_w == 0 &&
         s.dilation_h == 1 && s.dilation_w == 1 && s.out_h == s.in_h / 2 && s.out_w == s.in_w / 2;
}

template <int stride_w, class T>
FASTNN_INLINE void max_pool_planes_strided(const MaxPool2dShape& s, const T* x, T* y, uint8_t* code, int64_t begin,
                                           int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  // Outputs [inner, inner_end) have whole windows.
  const int64_t inner = least(s.out_w, ceil_div(s.pad_w, s.stride_w));
  const int64_t room = s.in_w + s.pad_w - (s.kernel_w - 1) * s.dilation_w;
  const int64_t inner_end = most(inner, least(s.out_w, ceil_div(room, s.stride_w)));
  const T* plane = x + begin / s.out_h * s.in_h * s.in_w;
  const T *x_end = x + ceil_div(end, s.out_h) * s.in_h * s.in_w, *y_end = y + end * s.out_w;
  for (int64_t row = begin, oy = begin % s.out_h; row < end; ++row, ++oy) {
    if (oy == s.out_h) oy = 0, plane += s.in_h * s.in_w;
    T* out = y + row * s.out_w;
    uint8_t* out_code = code + row * s.out_w;
    const int64_t origin_y = oy * s.stride_h - s.pad_h;
    const WindowSide rows = inside(origin_y, s.kernel_h, s.dilation_h, s.in_h);
    for (int64_t ox = 0; ox < s.out_w;) {
      if (ox < inner || ox >= inner_end || rows.first >= rows.last) {
        pool_one(s, plane, origin_y, rows, ox * s.stride_w - s.pad_w, out + ox, out_code + ox);
        ++ox;
        continue;
      }
      ox = most(inner, least(ox, inner_end - L));  // the last vector may begin inside the one before
      const int outputs = int(least(L, inner_end - ox));
      const T* window = plane + (origin_y + rows.first * s.dilation_h) * s.in_w + ox * s.stride_w - s.pad_w;
      const T* last = window + (rows.last - rows.first - 1) * s.dilation_h * s.in_w + (s.kernel_w - 1) * s.dilation_w;
      // Of a row shorter than a vector the other lanes are written too, with anything: what is there comes later.
      const int lanes = last + (L - 1) * s.stride_w < x_end && out + ox + L <= y_end ? L : outputs;
      Largest<Vec<A>, Mask<A>> largest{splat(-A(__builtin_inf())), Mask<A>{} + int(rows.first * s.kernel_w)};
      for (int64_t i = rows.first; i < rows.last; ++i, window += s.dilation_h * s.in_w)
        for (int64_t j = 0; j < s.kernel_w; ++j)
          largest.offer(load_strided<stride_w>(window + j * s.dilation_w, s.stride_w, lanes), int(i * s.kernel_w + j));
      store_lanes(out + ox, largest.value, lanes);
      store_bytes_n(out_code + ox, largest.element, lanes);
      ox += outputs;
    }
  }
}

// Windows side by side whose rows of outputs fill half a vector at the most: two rows to a vector. `end` - `begin` is
// even, and planes have no last row of their own, so that rows follow on one another through all planes.
template <class T>
void max_pool_short_rows(const MaxPool2dShape& s, const T* x, T* y, uint8_t* code, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const int lanes = int(2 * s.out_w), width = int(s.in_w);
  const T *x_end = x + end * 2 * s.in_w, *y_end = y + end * s.out_w;
  Mask<A> left, right;
  for (int i = 0; i < L; ++i) left[i] = i < s.out_w ? 2 * i : 2 * (i - int(s.out_w)) + L, right[i] = left[i] + 1;
  for (int64_t row = begin; row < end; row += 2) {
    const T* window = x + row * 2 * s.in_w;
    T* out = y + row * s.out_w;
    // Other lanes are written too where the next rows come to overwrite them.
    const bool whole = window + 3 * s.in_w + L <= x_end && out + L <= y_end;
    Largest<Vec<A>, Mask<A>> largest{splat(-A(__builtin_inf())), Mask<A>{}};
    for (int i = 0; i < 2; ++i, window += s.in_w) {
      const Vec<A> first = load_lanes(window, whole ? L : width);
      const Vec<A> second = load_lanes(window + 2 * s.in_w, whole ? L : width);
      largest.offer(__builtin_shuffle(first, second, left), 2 * i);
      largest.offer(__builtin_shuffle(first, second, right), 2 * i + 1);
    }
    store_lanes(out, largest.value, whole ? L : lanes);
    store_bytes_n(code + row * s.out_w, largest.element, whole ? L : lanes);
  }
}

template <class T>
void max_pool_planes(const MaxPool2dShape& any, const void* x_, void* y_, uint8_t* code, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  if (side_by_side(any)) {
    MaxPool2dShape s{};  // with what the compiler can make constants
    s.in_h = any.in_h, s.in_w = any.in_w, s.out_h = any.out_h, s.out_w = any.out_w;
    s.kernel_h = s.kernel_w = s.stride_h = s.stride_w = 2, s.dilation_h = s.dilation_w = 1;
    if (s.in_w <= kLanes<Accumulator<T>> && s.in_h == 2 * s.out_h) {
      const int64_t pairs_end = end - (end - begin) % 2;
      max_pool_short_rows(s, x, y, code, begin, pairs_end);
      begin = pairs_end;
    }
    return max_pool_planes_strided<2>(s, x, y, code, begin, end);
  }
  const MaxPool2dShape& s = any;
  if (s.stride_w == 1) return max_pool_planes_strided<1>(s, x, y, code, begin, end);
  if (s.stride_w == 2) return max_pool_planes_strided<2>(s, x, y, code, begin, end);
  max_pool_planes_strided<0>(s, x, y, code, begin, end);
}

// Two rows of a plane's gradient from one of its 2 x 2 windows' side by side.
template <class T>
FASTNN_INLINE void spread_row(const T* grad_y, const uint8_t* code, T* grad_x, int64_t in_w, int64_t out_w) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  Mask<A> low, high;
  for (int i = 0; i < L; ++i) low[i] = i / 2 + i % 2 * L, high[i] = low[i] + L / 2;
  for (int64_t ox = 0; ox < out_w; ox += L) {
    const int lanes = int(least(L, out_w - ox));
    const Vec<A> grad = load_lanes(grad_y + ox, lanes), zero{};
    const Mask<A> element = load_bytes_n<A>(code + ox, lanes, kPoolNone);
    for (int i = 0; i < 2; ++i) {
      const Vec<A> left = element == 2 * i ? grad : zero, right = element == 2 * i + 1 ? grad : zero;
      T* to = grad_x + i * in_w + 2 * ox;
      store_lanes(to, __builtin_shuffle(left, right, low), 2 * lanes);
      store_lanes(to + L, __builtin_shuffle(left, right, high), 2 * lanes - L);
    }
  }
  if (2 * out_w < in_w)
    for (int i = 0; i < 2; ++i) grad_x[i * in_w + 2 * out_w] = from_accumulator<T>(0);
}

template <class T>
void max_pool_planes_backward(const MaxPool2dShape& s, const void* grad_y_, const uint8_t* code, void* grad_x_,
                              float* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr bool kInPlace = sizeof(A) == sizeof(T);
  const int64_t in = s.in_h * s.in_w, out = s.out_h * s.out_w;
  const bool spread = side_by_side(s);
  for (int64_t p = begin; p < end; ++p) {
    const T* grad_y = static_cast<const T*>(grad_y_) + p * out;
    const uint8_t* codes = code + p * out;
    T* grad_x = static_cast<T*>(grad_x_) + p * in;
    if (spread) {
      for (int64_t oy = 0; oy < s.out_h; ++oy)
        spread_row(grad_y + oy * s.out_w, codes + oy * s.out_w, grad_x + 2 * oy * s.in_w, s.in_w, s.out_w);
      __builtin_memset(grad_x + 2 * s.out_h * s.in_w, 0, size_t(s.in_h % 2 * s.in_w) * sizeof(T));
      continue;
    }
    A* sum = reinterpret_cast<A*>(scratch);
    if constexpr (kInPlace) sum = grad_x;
    __builtin_memset(sum, 0, size_t(in) * sizeof(A));
    for (int64_t oy = 0; oy < s.out_h; ++oy)
      for (int64_t ox = 0; ox < s.out_w; ++ox) {
        const int64_t o = oy * s.out_w + ox;
        if (codes[o] >= s.kernel_h * s.kernel_w) continue;
        const int64_t row = oy * s.stride_h - s.pad_h + codes[o] / s.kernel_w * s.dilation_h;
        const int64_t col = ox * s.stride_w - s.pad_w + codes[o] % s.kernel_w * s.dilation_w;
        // Always so of codes from forward.
        if (row >= 0 && row < s.in_h && col >= 0 && col < s.in_w) sum[row * s.in_w + col] += to_accumulator(grad_y[o]);
      }
    if constexpr (!kInPlace)
      for (int64_t i = 0; i < in; ++i) grad_x[i] = from_accumulator<T>(sum[i]);
  }
}

// ---- channels_last ----

template <class T>
void max_pool_pixels(const MaxPool2dShape& s, const void* x_, void* y_, uint8_t* code, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_) + begin * s.out_w * s.channels;
  code += begin * s.out_w * s.channels;
  const T* pixels[kPoolNone];
  int elements[kPoolNone];
  for (int64_t row = begin; row < end; ++row) {
    const T* image = x + row / s.out_h * s.in_h * s.in_w * s.channels;
    const int64_t origin_y = row % s.out_h * s.stride_h - s.pad_h;
    const WindowSide rows = inside(origin_y, s.kernel_h, s.dilation_h, s.in_h);
    for (int64_t ox = 0; ox < s.out_w; ++ox, y += s.channels, code += s.channels) {
      const int64_t origin_x = ox * s.stride_w - s.pad_w;
      const WindowSide cols = inside(origin_x, s.kernel_w, s.dilation_w, s.in_w);
      int count = 0;
      for (int64_t i = rows.first; i < rows.last; ++i)
        for (int64_t j = cols.first; j < cols.last; ++j) {
          const int64_t pixel = (origin_y + i * s.dilation_h) * s.in_w + origin_x + j * s.dilation_w;
          pixels[count] = image + pixel * s.channels;
          elements[count++] = int(i * s.kernel_w + j);
        }
      const int first = count ? elements[0] : int(kPoolNone);
      for (int64_t c = 0; c < s.channels; c += L) {
        const int lanes = int(least(L, s.channels - c));
        Largest<Vec<A>, Mask<A>> largest{splat(-A(__builtin_inf())), Mask<A>{} + first};
        for (int k = 0; k < count; ++k) largest.offer(load_lanes(pixels[k] + c, lanes), elements[k]);
        store_lanes(y + c, largest.value, lanes);
        store_bytes_n(code + c, largest.element, lanes);
      }
    }
  }
}

template <class T>
void max_pool_pixels_backward(const MaxPool2dShape& s, const MaxPool2dSide& rows, const MaxPool2dSide& cols,
                              const void* grad_y_, const uint8_t* code, void* grad_x_, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  T* grad_x = static_cast<T*>(grad_x_) + begin * s.in_w * s.channels;
  int64_t outputs[kPoolNone];
  int elements[kPoolNone];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / s.in_h * s.out_h * s.out_w * s.channels;
    const T* grad_y = static_cast<const T*>(grad_y_) + image;
    const uint8_t* codes = code + image;
    const MaxPool2dWindows& down = rows.windows[row % s.in_h];
    for (int64_t ix = 0; ix < s.in_w; ++ix, grad_x += s.channels) {
      const MaxPool2dWindows& right = cols.windows[ix];
      int count = 0;
      for (int i = 0; i < down.count; ++i)
        for (int j = 0; j < right.count; ++j) {
          const int64_t oy = down.output - i * rows.output_step, ox = right.output - j * cols.output_step;
          outputs[count] = (oy * s.out_w + ox) * s.channels;
          elements[count++] =
              (down.element + i * rows.element_step) * int(s.kernel_w) + right.element + j * cols.element_step;
        }
      for (int64_t c = 0; c < s.channels; c += L) {
        const int lanes = int(least(L, s.channels - c));
        Vec<A> sum{};
        for (int k = 0; k < count; ++k) {
          const int64_t at = outputs[k] + c;
          const Vec<A> grad = load_lanes(grad_y + at, lanes);
          sum += load_bytes_n<A>(codes + at, lanes, kPoolNone) == elements[k] ? grad : Vec<A>{};
        }
        store_lanes(grad_x + c, sum, lanes);
      }
    }
  }
}

const MaxPool2dKernels kMaxPool2dKernels = {
    {max_pool_planes<double>, max_pool_planes<float>, max_pool_planes<bf16>, max_pool_planes<f16>},
    {max_pool_planes_backward<double>, max_pool_planes_backward<float>, max_pool_planes_backward<bf16>,
     max_pool_planes_backward<f16>},
    {max_pool_pixels<double>, max_pool_pixels<float>, max_pool_pixels<bf16>, max_pool_pixels<f16>},
    {max_pool_pixels_backward<double>, max_pool_pixels_backward<float>, max_pool_pixels_backward<bf16>,
     max_pool_pixels_backward<f16>},
};
