// 1 x 1 convolution without padding on channels_last memory: the matrix product of pixels x channels and channels x
// results, forward and (with both swapped) for the gradient of the input.
//
// Blocking: kPoints pixels x 2 vectors of results stay in registers over the channels. A step broadcasts a channel of
// each pixel from where it lies in memory, nothing packed, and loads two vectors of the weight, whose panel of two
// vectors of results (packed once a call) stays in the L1 cache over a block of pixels; the pixels stay in the L2 cache
// over the panels. Results go straight to their place. Sources of 16 bits, and gradients under ReLU's mask, are first
// copied to the accumulator's type, a block at a time.
// Loads are (kPoints + 2) / (2 * kPoints) of the FMAs.
//
// Operations: 2 * pixels * channels * results; bytes: each tensor once, the weight once a block of pixels.

#if FASTNN_VECTOR_BYTES == 64
constexpr int kPoints = 12;
#else
constexpr int kPoints = 6;
#endif
constexpr int64_t kPanelDepth = (16 << 10) / (2 * FASTNN_VECTOR_BYTES);  // float32 channels of a panel in the L1 cache
constexpr int64_t kPointBytes = 256 << 10;                               // a block of pixels in the L2 cache

// A block of pixels against one panel, a run of `depth` channels.
template <class T>
struct PointBlock {
  using A = Accumulator<T>;
  const A* pixels;
  int64_t pixel_pitch, depth;
  const A* weight;  // [depth][two vectors]
  const A* bias;    // or null
  A* partial;       // [pixel][two vectors]: sums so far, unless `first`; where they go, unless `last`
  T* result;
  int64_t result_pitch;
  int results;  // of the panel's two vectors
  bool first, last, relu;
};

template <class T, int NP>
void multiply_points(const PointBlock<T>& b, int64_t i) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sum[NP][2];
  for (int v = 0; v < 2; ++v) {
    const int lanes = int(most(0, least(L, b.results - v * L)));
    const Vec<A> start = b.bias ? load_n(b.bias + v * L, lanes) : Vec<A>{};
#pragma GCC unroll 12
    for (int n = 0; n < NP; ++n) sum[n][v] = b.first ? start : load(b.partial + ((i + n) * 2 + v) * L);
  }
  const A* pixel = b.pixels + i * b.pixel_pitch;
  const A* weight = b.weight;
  for (int64_t c = 0; c < b.depth; ++c, ++pixel, weight += 2 * L) {
    const Vec<A> w0 = load(weight), w1 = load(weight + L);
#pragma GCC unroll 12
    for (int n = 0; n < NP; ++n) {
      const Vec<A> x = splat(pixel[n * b.pixel_pitch]);
      sum[n][0] += x * w0;
      sum[n][1] += x * w1;
    }
  }
#pragma GCC unroll 12
  for (int n = 0; n < NP; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if (!b.last) {
        store(b.partial + ((i + n) * 2 + v) * L, sum[n][v]);
        continue;
      }
      const Vec<A> value = b.relu ? (sum[n][v] < Vec<A>{} ? Vec<A>{} : sum[n][v]) : sum[n][v];
      T* to = b.result + (i + n) * b.result_pitch + v * L;
      if (b.results >= (v + 1) * L)
        store(to, value);
      else if (b.results > v * L)
        store_n(to, value, b.results - v * L);
    }
}

template <class T, int NP>
FASTNN_INLINE void multiply_points_of(int64_t count, const PointBlock<T>& b, int64_t i) {
  if constexpr (NP > 1)
    if (count < NP) return multiply_points_of<T, NP - 1>(count, b, i);
  multiply_points<T, NP>(b, i);
}

// Panels [begin, end) of two vectors of results: packed[panel][channel][result]. strides: of group (there is one),
// result and channel.
template <class T>
void pack_points_weight(const TapConv& p, const void* weight_, const int64_t* strides, void* packed_, int64_t begin,
                        int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kWidth = 2 * kLanes<A>;
  const T* weight = static_cast<const T*>(weight_) + p.taps[0].weight;
  for (int64_t panel = begin; panel < end; ++panel) {
    A* packed = static_cast<A*>(packed_) + panel * kWidth * p.group_channels;
    for (int64_t c = 0; c < p.group_channels; ++c)
      for (int64_t k = 0; k < kWidth; ++k, ++packed) {
        const int64_t m = panel * kWidth + k;
        *packed = m < p.group_results ? to_accumulator(weight[m * strides[1] + c * strides[2]]) : A(0);
      }
  }
}

// A block of pixels in the accumulator's type, under ReLU's mask: to[pixel][channel].
template <class T>
void copy_points(const T* from, int64_t step, const T* relu, int64_t relu_step, int64_t count, int64_t channels,
                 Accumulator<T>* to) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const Vec<A> zero{};
  for (int64_t i = 0; i < count; ++i, from += step, relu += relu ? relu_step : 0, to += channels)
    for (int64_t c = 0; c < channels; c += L) {
      const int lanes = int(least(L, channels - c));
      const Vec<A> value = lanes == L ? load(from + c) : load_n(from + c, lanes);
      const Vec<A> masked = !relu                                                             ? value
                            : (lanes == L ? load(relu + c) : load_n(relu + c, lanes)) <= zero ? zero
                                                                                              : value;
      if (lanes == L)
        store(to + c, masked);
      else
        store_n(to + c, masked, lanes);
    }
}

// Tasks [begin, end): a result row of one image, and a share of the panels.
template <class T>
void run_points(const TapConv& p, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kWidth = 2 * kLanes<A>, kDepth = kPanelDepth * 4 / int64_t(sizeof(A));
  const int64_t panels = ceil_div(p.group_results, kWidth), channels = p.group_channels;
  A* const partial = static_cast<A*>(scratch);
  A* const copied = partial + p.cols * kWidth;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / p.channel_blocks, share = task % p.channel_blocks, n = row / p.rows, y = row % p.rows;
    const int64_t source_y = y * p.planes.step_h;
    const T* source = static_cast<const T*>(p.source.data) + n * p.source.stride.n + source_y * p.source.stride.h;
    const int64_t step = p.planes.step_w * p.source.stride.w, relu_step = p.planes.step_w * p.source.relu_stride.w;
    const T* relu = static_cast<const T*>(p.source.relu_output);
    if (relu) relu += n * p.source.relu_stride.n + source_y * p.source.relu_stride.h;
    T* result = static_cast<T*>(p.result.data) + n * p.result.stride.n + y * p.result.stride.h;
    const int64_t most_points = most(kPoints, kPointBytes / (channels * int64_t(sizeof(A))) / kPoints * kPoints);
    for (int64_t x = 0; x < p.cols; x += most_points) {
      const int64_t count = least(most_points, p.cols - x);
      PointBlock<T> b;
      b.result_pitch = p.result.stride.w;
      b.relu = p.relu;
      b.partial = partial;
      const A* pixels;
      if constexpr (sizeof(A) == sizeof(T)) pixels = source + x * step;
      if (sizeof(A) != sizeof(T) || relu) {
        copy_points<T>(source + x * step, step, relu ? relu + x * relu_step : nullptr, relu_step, count, channels,
                       copied);
        pixels = copied;
        b.pixel_pitch = channels;
      } else {
        b.pixel_pitch = step;
      }
      for (int64_t panel = panels * share / p.channel_blocks; panel < panels * (share + 1) / p.channel_blocks;
           ++panel) {
        const int64_t m = panel * kWidth;
        b.results = int(least(kWidth, p.group_results - m));
        b.bias = p.bias ? static_cast<const A*>(p.bias) + m : nullptr;
        b.result = result + x * p.result.stride.w + m;
        for (int64_t c = 0; c < channels; c += kDepth) {
          b.depth = least(kDepth, channels - c);
          b.pixels = pixels + c;
          b.weight = static_cast<const A*>(p.weight) + (panel * channels + c) * kWidth;
          b.first = c == 0, b.last = c + b.depth == channels;
          for (int64_t i = 0; i < count; i += kPoints) multiply_points_of<T, kPoints>(least(kPoints, count - i), b, i);
        }
      }
    }
  }
}

#define FASTNN_ALL_DTYPES(function) {function<double>, function<float>, function<bf16>, function<f16>}
const PointwiseKernels kPointwiseKernels = {
    {2 * kLanes<double>, 2 * kLanes<float>},
    FASTNN_ALL_DTYPES(pack_points_weight),
    FASTNN_ALL_DTYPES(run_points),
};
#undef FASTNN_ALL_DTYPES
