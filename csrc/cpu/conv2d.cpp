// Glue of fastnn::conv2d, conv2d_relu_max_pool2d and conv2d_backward on the CPU: checks, output allocation, and the
// plan of a call (how planes are laid out and work is cut); the kernels are in kernels/conv2d*_tier.h.
#include <algorithm>
#include <array>
#include <atomic>
#include <limits>

#include "common/conv2d_call.h"
#include "common/python_tensors.h"
#include "cpu/bindings.h"
#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/conv2d_depthwise.h"
#include "cpu/kernels/conv2d_pointwise.h"
#include "cpu/kernels/conv2d_pooled.h"
#include "cpu/kernels/conv2d_winograd.h"
#include "cpu/memory.h"

namespace fastnn::cpu {
namespace {

// A task's packed planes and its result panel, which share the L2 cache.
constexpr int64_t kPlanesBytes = 256 << 10, kPanelBytes = 128 << 10;
// Of a long reduction a panel's results share what a tile read into the L1 cache; of a short one they only make blocks
// of fewer rows, whose halos are packed more often.
constexpr int64_t kPanelResults = 64, kShortPanelResults = 16;
constexpr int64_t kDepthBytes = 20 << 10;  // a tile's operands: most of an L1 cache, beside the weights that pass by
// Positions of a block of the weight gradient, at the most. A tile's sums are read and written once a block, so a
// window's blocks are longer; that of few channels repacks a halo for each, and dot products sum lanes once a block and
// pair.
constexpr int64_t kFewPositions = 1024, kManyPositions = 512, kManyPositionsOneTap = 256, kGradBytes = 384 << 10;
// Channels of either side a block takes: a block is packed once for each block of the other side, and that takes more
// of the time where there is one tap to use it.
constexpr int64_t kGradChannels = 64, kGradChannelsOneTap = 256;
constexpr int64_t kGradTasks = 32;                  // at the least, where the shape allows: shape alone decides
constexpr int64_t kSliceBytes = int64_t(64) << 20;  // all private weight gradients together

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every phase of the stride is a plan of its own.
ConvShape few_phases(const char* op, const ConvShape& s) {
  STD_TORCH_CHECK(s.stride_h * s.stride_w <= kMaxPhases, op, ": stride is ", s.stride_h, " x ", s.stride_w,
                  ", expected at most ", kMaxPhases, " in all");
  return s;
}

// Blocks of rows: whole pooling windows, and as even as they come.
struct Cut {
  int64_t block, blocks;
};
Cut cut_rows(int64_t rows, int64_t block, const PoolShape& pool) {
  const int64_t overlap = std::max<int64_t>(0, pool.kernel_h - pool.stride_h), unit = pool.kernel_h ? pool.stride_h : 1;
  const int64_t windows = pool.kernel_h ? pool.out_h : rows;
  const int64_t fit = std::max<int64_t>(1, (block - overlap) / unit);
  const int64_t blocks = ceil_div(windows, fit), each = ceil_div(windows, blocks);
  return {each * unit + overlap, ceil_div(windows, each)};
}

void set_pitch(Planes& p, int64_t source_w, int64_t cols) {
  p.pitch = cols + p.halo_w;
  // The zeros right of a row may be those left of the next one.
  if (p.step_w == 1)
    p.pitch = std::max(std::max(p.origin_w, int64_t(0)) + source_w, p.pitch - std::max(p.origin_w, int64_t(0)));
  p.pitch = std::max(p.pitch, cols);
}

// Finds the phases that the taps read, replaces their (row, col) by offsets inside them, and sets the pitch.
void plan_planes(Planes& p, std::vector<Tap>& taps, int64_t source_w, int64_t cols) {
  p.phases = p.halo_h = p.halo_w = 0;
  for (Tap& tap : taps) {
    const int64_t a = tap.row % p.step_h, b = tap.col % p.step_w;
    tap.phase = 0;
    while (tap.phase < p.phases && (p.phase_h[tap.phase] != a || p.phase_w[tap.phase] != b)) ++tap.phase;
    if (tap.phase == p.phases) p.phase_h[p.phases] = a, p.phase_w[p.phases] = b, ++p.phases;
    tap.row /= p.step_h, tap.col /= p.step_w;
    p.halo_h = std::max(p.halo_h, tap.row), p.halo_w = std::max(p.halo_w, tap.col);
  }
  set_pitch(p, source_w, cols);
}

void set_block(Planes& p, int64_t rows, int64_t images, int64_t lanes) {
  p.block_rows = rows, p.block_images = images;
  const int64_t slack = 3 * lanes + p.halo_w + std::max<int64_t>(0, p.origin_w);
  // An odd number of cache lines: planes that lie a power of two apart would share cache sets.
  const int64_t lines = (images * (rows + p.halo_h) * p.pitch + slack + 15) / 16 | 1;
  p.plane = p.phases * lines * 16;
}

// Whether neighbours along a dimension are neighbours in memory; `dim` picks it from the strides.
bool contiguous_along(int64_t Strides4::* dim, const ConvSource& s) {
  return s.stride.*dim == 1 && (!s.relu_output || s.relu_stride.*dim == 1);
}

// Groups a task takes: where channels are neighbours in memory, enough for a pixel to give whole vectors.
template <class Problem>
int64_t groups_together(const Problem& p, bool channels_contiguous) {
  if (!channels_contiguous) return 1;
  return std::min(p.groups, ceil_div(16, std::min(p.group_channels, p.group_results)));
}

// Cuts a TapConv of `depth` operands a result and tap into tasks that fit the cache, and enough of them for the
// threads.
void plan(TapConv& p, int64_t depth, int64_t element, int64_t lanes, int64_t tile_results) {
  const int64_t threads = torch::stable::get_num_threads();
  const PoolShape& pool = p.result.pool;
  p.block_groups = groups_together(p, p.source.stride.c == 1 || p.result.stride.c == 1);
  p.block_results = p.group_results;
  p.panel = depth * p.most_taps() < kShortDepth ? kShortPanelResults : kPanelResults;
  if (p.group_results < p.panel) p.panel = std::min(p.panel / p.group_results, p.block_groups) * p.group_results;

  const int64_t row_positions = p.planes.pitch;
  const auto fits = [&](int64_t rows, int64_t images) {
    set_block(p.planes, rows, images, lanes);
    return p.block_groups * depth * p.planes.plane * element <= kPlanesBytes &&
           p.panel * images * (rows + p.planes.halo_h) * row_positions * element <= kPanelBytes;
  };
  int64_t rows = p.rows;
  while (rows > 1 && !fits(rows, 1)) rows = rows > 16 ? rows * 3 / 4 : rows - 1;
  int64_t images = 1;
  if (rows == p.rows)
    while (images < p.batch && images < 64 && fits(rows, images + 1)) ++images;
  Cut cut = cut_rows(p.rows, rows, pool);
  const auto count = [&] { return ceil_div(p.batch, images) * cut.blocks * ceil_div(p.groups, p.block_groups); };
  while (count() < 2 * threads && images > 1) images = ceil_div(images, 2);
  while (count() < 2 * threads && cut.block > 8 && cut.blocks < p.rows / 4) cut = cut_rows(p.rows, cut.block / 2, pool);
  images = ceil_div(p.batch, ceil_div(p.batch, images));
  set_block(p.planes, cut.block, images, lanes);
  p.image_blocks = ceil_div(p.batch, images), p.row_blocks = cut.blocks;
  int64_t splits = 1;
  if (p.block_groups == 1) {
    splits = std::min(ceil_div(p.group_results, tile_results), ceil_div(2 * threads, count()));
    p.block_results = ceil_div(ceil_div(p.group_results, splits), tile_results) * tile_results;
    splits = ceil_div(p.group_results, p.block_results);
  }
  p.channel_blocks = ceil_div(p.groups, p.block_groups) * splits;
  // An operand's part of a tile: some three cache lines for every plane row that the taps read.
  p.block_depth = std::max<int64_t>(8, kDepthBytes / ((p.planes.halo_h + 1) * p.planes.phases * 192));
  const int64_t positions = images * (cut.block + p.planes.halo_h) * p.planes.pitch + 2 * lanes;
  p.scratch = (p.most_taps() + 8) * 24 + (p.block_groups * depth * p.planes.plane + p.panel * positions) * element;
}

int64_t count_slices(const TapGrad& p, int64_t blocks, int64_t element) {
  const int64_t weights = p.groups * p.group_results * p.group_channels * p.num_taps * element;
  return std::min({blocks, ceil_div(kGradTasks, p.channel_blocks), std::max<int64_t>(1, kSliceBytes / weights)});
}

void plan(TapGrad& p, int64_t terms, int64_t element, int64_t lanes, int64_t lane_vectors) {
  p.form = p.group_channels >= 2 * lanes ? GradForm::channel_lanes
           : p.group_results >= 2 * lanes &&
                   (p.cols < lanes || terms > 1 || (contiguous_along(&Strides4::c, p.grad) && p.grad.stride.w != 1))
               ? GradForm::result_lanes
               : GradForm::position_lanes;
  p.block_groups =
      p.form == GradForm::position_lanes ? groups_together(p, p.source.stride.c == 1 || p.grad.stride.c == 1) : 1;
  const int64_t most_channels = p.num_taps == 1 ? kGradChannelsOneTap : kGradChannels;
  p.block_channels = p.block_groups > 1 ? p.group_channels : std::min(p.group_channels, most_channels);
  p.block_results = p.block_groups > 1 ? p.group_results : std::min(p.group_results, most_channels);
  const int64_t most_positions = p.form != GradForm::channel_lanes ? kFewPositions
                                 : p.num_taps == 1                 ? kManyPositionsOneTap
                                                                   : kManyPositions;
  const auto fits = [&](int64_t rows, int64_t images) {
    set_block(p.planes, rows, images, lanes);
    const int64_t grad_plane = p.planes.plane / p.planes.phases;
    return images * rows * p.planes.pitch <= most_positions &&
           p.block_groups * (p.block_channels * p.planes.plane + p.block_results * grad_plane) * element <= kGradBytes;
  };
  int64_t rows = p.rows, images = 1;
  while (rows > 1 && !fits(rows, 1)) --rows;
  if (rows == p.rows)
    while (images < p.batch && fits(rows, images + 1)) ++images;
  const Cut cut = cut_rows(p.rows, rows, PoolShape{});
  images = ceil_div(p.batch, ceil_div(p.batch, images));
  set_block(p.planes, cut.block, images, lanes);
  p.image_blocks = ceil_div(p.batch, images), p.row_blocks = cut.blocks;
  p.channel_blocks = ceil_div(p.groups, p.block_groups) * ceil_div(p.group_results, p.block_results) *
                     ceil_div(p.group_channels, p.block_channels);
  p.slices = count_slices(p, p.image_blocks * p.row_blocks, element);
  // Lanes are padded to whole tiles, rows to whole vectors; packed by position, both pass through rows of planes.
  const bool by_position = p.form != GradForm::position_lanes;
  const int64_t tile = lane_vectors * lanes;
  const int64_t width = p.form == GradForm::channel_lanes ? tile : 1, grad_width = by_position ? tile : 1;
  const int64_t channels = ceil_div(p.block_channels, width) * width;
  const int64_t results = ceil_div(p.block_results, grad_width) * grad_width;
  p.scratch =
      p.offset_bytes() + (p.block_groups * (channels * p.planes.plane + results * p.planes.plane / p.planes.phases) +
                          (by_position ? lanes * (p.planes.pitch + 2 * lanes) : 0)) *
                             element;
}

// A 1 x 1 convolution sees no rows: joins as many as divide them into longer ones, where all operands' rows are
// adjacent. Short rows cost a call and a partial vector each.
void join_rows(ConvShape& s, std::initializer_list<ConvSource*> sources, std::initializer_list<Strides4*> others) {
  if (s.kernel_h * s.kernel_w != 1 || s.stride_h * s.stride_w != 1 || s.in_h != s.out_h || s.in_w != s.out_w) return;
  bool adjacent = true;
  for (const ConvSource* source : sources) {
    adjacent &= source->stride.h == s.in_w * source->stride.w;
    adjacent &= !source->relu_output || source->relu_stride.h == s.in_w * source->relu_stride.w;
  }
  for (const Strides4* stride : others) adjacent &= stride->h == s.in_w * stride->w;
  int64_t rows = 1;
  for (int64_t k = 2; adjacent && k <= s.in_h && k * s.in_w <= kManyPositions; ++k)
    if (s.in_h % k == 0) rows = k;
  s.in_h /= rows, s.out_h /= rows, s.in_w *= rows, s.out_w *= rows;
  for (ConvSource* source : sources) {
    source->height /= rows, source->width *= rows;
    source->stride.h *= rows, source->relu_stride.h *= rows;
  }
  for (Strides4* stride : others) stride->h *= rows;
}

int64_t accumulator_size(DType dtype) { return dtype == kFloat64 ? 8 : 4; }

// Runs tasks [0, tasks) of a plan, each thread in scratch of its own.
template <class Plan, class Kernel>
void run_tasks(const Plan& plan, Kernel kernel) {
  torch::stable::parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch(plan.scratch);
    kernel(plan, scratch.get(), begin, end);
  });
}

// The same of a kernel that says whether all it computed is finite. Whether all of them said so.
template <class Plan, class Kernel>
bool run_finite_tasks(const Plan& plan, Kernel kernel) {
  std::atomic<bool> finite{true};
  run_tasks(plan, [&](const Plan& p, void* scratch, int64_t begin, int64_t end) {
    if (!kernel(p, scratch, begin, end)) finite = false;
  });
  return finite;
}

// ---- one channel a group ----

constexpr int64_t kDepthwiseGrain = 16 << 10;        // elements a thread takes at the least
constexpr int64_t kDepthwiseLinesBytes = 384 << 10;  // lines of many channels: a part of the L2 cache
constexpr int64_t kDepthwisePlaneBytes = 16 << 10;   // lines of one channel: a part of the L1 cache
constexpr int64_t kDepthwiseBlockRows = 8;           // of a task at the least, as its first lines are packed twice
constexpr int64_t kDepthwisePlanes = 16;             // channels of NCHW whose gradients a task sums image by image

// The lines of a problem's source, of which a result reads `down` rows and `right` plane columns past its first.
DepthwiseLines plan_lines(bool by_channel, const Planes& p, int64_t rows, int64_t cols, int64_t down, int64_t right,
                          int64_t channels, int64_t element) {
  DepthwiseLines l{};
  l.by_channel = by_channel, l.step_h = p.step_h, l.step_w = p.step_w;
  l.origin_h = p.origin_h, l.origin_w = p.origin_w;
  l.columns = l.pitch = cols + right;
  // An odd number of cache lines: pixels that lie a power of two apart would share cache sets.
  l.pixel = by_channel ? (ceil_div(channels, kDepthwiseVector) | 1) * kDepthwiseVector : 1;
  // Room for the row's alignment and for vectors that reach past it.
  if (!by_channel)
    l.pitch = (ceil_div(std::max(cols, kDepthwiseVector) + right, kDepthwiseVector) + 2) * kDepthwiseVector;
  l.size = p.step_w * l.pitch * l.pixel;
  for (l.rows = 0; l.rows == 0 || (!by_channel && l.rows < rows && l.bytes(element) < kDepthwisePlaneBytes);) {
    l.rows += kDepthwiseRows;
    l.table_rows = ceil_div((l.rows - 1) * p.step_h + down + 1, p.step_h);
    l.ring = l.table_rows * p.step_h;
  }
  return l;
}

// Channels a task takes of channels_last memory: as many as keep its lines in the cache, in whole cache lines.
int64_t channels_that_fit(const DepthwiseLines& l, int64_t channels, int64_t element) {
  const int64_t blocks = ceil_div(l.bytes(element), kDepthwiseLinesBytes);
  return std::min(channels, std::max<int64_t>(64, ceil_div(channels, 16 * blocks) * 16));
}

// The last source row, of the first a result could read, that it does.
int64_t reach_h(const Planes& p, const Tap* taps, int64_t count) {
  int64_t reach = 0;
  for (const Tap* tap = taps; tap < taps + count; ++tap)
    reach = std::max(reach, tap->row * p.step_h + p.phase_h[tap->phase]);
  return reach;
}

// Whether vectors of a source's channels can be taken from its memory.
bool can_read_in_place(const DepthwiseLines& l, const ConvSource& s, int64_t channels, DType dtype) {
  return l.by_channel && !s.relu_output && channels % kDepthwiseVector == 0 &&
         (dtype == kFloat32 || dtype == kFloat64) && s.stride.w * s.width <= l.size;
}

// The source columns that the taps of result column 0 read.
struct ColumnRange {
  int64_t first = std::numeric_limits<int64_t>::max(), last = std::numeric_limits<int64_t>::min();

  void add(const Planes& p, const Tap* taps, int64_t count) {
    for (const Tap* tap = taps; tap < taps + count; ++tap) {
      const int64_t column = tap->col * p.step_w + p.phase_w[tap->phase] - p.origin_w;
      first = std::min(first, column), last = std::max(last, column);
    }
  }
};

// Reads a source in place, where that can be, for those result columns whose taps meet no padding.
void read_in_place(DepthwiseLines& l, const ConvSource& s, int64_t channels, DType dtype, int64_t cols,
                   const ColumnRange& read) {
  if (!can_read_in_place(l, s, channels, dtype)) return;
  const int64_t begin = read.first < 0 ? ceil_div(-read.first, l.step_w) : 0;
  const int64_t end = read.last < s.width ? std::min(cols, (s.width - 1 - read.last) / l.step_w + 1) : 0;
  if (begin >= end) return;
  l.in_place_begin = begin, l.in_place_end = end;
  const int64_t left_end = begin > 0 ? (begin - 1) * l.step_w + read.last + 1 : 0;
  l.skip_begin = std::max({left_end, -l.origin_w, int64_t(0)});
  l.skip_end = std::max(l.skip_begin, end < cols ? end * l.step_w + read.first : s.width);
}

// Runs a problem whose result falls into up_h x up_w phases (a gradient of the input with a stride; otherwise 1 x 1),
// of a tensor with strides `result`. False where no kernel takes these layouts. strides: as in run_conv.
bool run_depthwise(const std::vector<TapConv>& phases, int64_t up_h, int64_t up_w, const Strides4& result, DType dtype,
                   const Tensor& weight, std::array<int64_t, 3> strides) {
  const DepthwiseKernels& kernels = depthwise_kernels();
  const int64_t element = accumulator_size(dtype), threads = torch::stable::get_num_threads();
  const TapConv& first = phases.front();
  const bool by_column = result.w == 1 && contiguous_along(&Strides4::w, first.source);
  const bool by_channel = first.groups > 1 && result.c == 1 && contiguous_along(&Strides4::c, first.source);
  int64_t taps = 0;
  for (const TapConv& p : phases) taps += p.num_taps;
  const int64_t group = first.group_channels, channels = first.results();
  const bool whole_groups = conv_kernels().lanes[element == 4] % group == 0 && group <= kDepthwiseMaxGroup;
  const bool in_columns = by_column && group == 1;
  if (group != first.group_results || taps > kDepthwiseMaxTaps || first.result.pool_code ||
      !(in_columns || (by_channel && whole_groups)))
    return false;

  // All phases read the same lines: those of the phase that starts first, up to the one that ends last.
  DepthwiseConv d{};
  Planes planes = first.planes;
  for (const TapConv& p : phases) {
    planes.origin_h = std::max(planes.origin_h, p.planes.origin_h);
    planes.origin_w = std::max(planes.origin_w, p.planes.origin_w);
    d.rows = std::max(d.rows, p.rows), d.cols = std::max(d.cols, p.cols);
  }
  int64_t down = 0, right = 0;
  for (const TapConv& p : phases) {
    down = std::max(down, reach_h(p.planes, p.taps, p.num_taps) + planes.origin_h - p.planes.origin_h);
    right = std::max(right, p.planes.halo_w + planes.origin_w - p.planes.origin_w);
  }
  const auto lines = [&](int64_t count) {
    return plan_lines(!in_columns, planes, d.rows, d.cols, down, right, count, element);
  };
  d.block_channels = in_columns ? 1 : channels_that_fit(lines(channels), channels, element);
  d.lines = lines(d.block_channels);
  ColumnRange read;
  for (const TapConv& p : phases) read.add(p.planes, p.taps, p.num_taps);
  read_in_place(d.lines, first.source, channels, dtype, d.cols, read);
  d.channel_blocks = ceil_div(channels, d.block_channels);
  d.block_rows = d.rows;
  while (threads > 1 && d.block_rows > kDepthwiseBlockRows &&
         first.batch * d.channel_blocks * ceil_div(d.rows, d.block_rows) < 4 * threads)
    d.block_rows = ceil_div(d.block_rows / 2, kDepthwiseRows) * kDepthwiseRows;
  d.row_blocks = ceil_div(d.rows, d.block_rows);
  d.up_h = up_h, d.up_w = up_w;

  const int64_t padded = ceil_div(channels, kDepthwiseVector) * kDepthwiseVector;
  const Scratch<char> packed((taps * group + int64_t(phases.size())) * padded * element);
  std::vector<TapConv> packed_phases = phases;
  char* to = packed.get();
  for (TapConv& p : packed_phases) {
    kernels.pack_weight[dtype](d.lines, p, weight.data_ptr(), strides.data(), to);
    p.weight = to;
    to += (p.num_taps * group + 1) * padded * element;
  }
  d.phases = packed_phases.data();
  const int64_t vectors = up_w * kDepthwiseRows * kDepthwiseSpan + taps + int64_t(phases.size());
  const int64_t bytes = d.lines.bytes(element) + vectors * kDepthwiseVector * element;
  torch::stable::parallel_for(
      0, d.tasks(), std::max<int64_t>(1, kDepthwiseGrain / (up_h * up_w * d.block_rows * d.cols * d.block_channels)),
      [&](int64_t begin, int64_t end) {
        const Scratch<char> scratch(bytes);
        kernels.run[dtype](d, scratch.get(), begin, end);
      });
  return true;
}

// False, likewise.
bool plan_depthwise(TapGrad& p, DType dtype, DepthwiseGrad& d) {
  const int64_t element = accumulator_size(dtype);
  const bool by_column = contiguous_along(&Strides4::w, p.source) && contiguous_along(&Strides4::w, p.grad);
  const bool by_channel =
      p.groups > 1 && contiguous_along(&Strides4::c, p.source) && contiguous_along(&Strides4::c, p.grad);
  if (p.group_channels > 1 || p.group_results > 1 || p.num_taps > kDepthwiseMaxTaps || !(by_column || by_channel))
    return false;
  const int64_t down = reach_h(p.planes, p.taps, p.num_taps);
  const auto lines = [&](int64_t channels) {
    return plan_lines(!by_column, p.planes, p.rows, p.cols, down, p.planes.halo_w, channels, element);
  };
  d.block_channels =
      by_column ? std::min(p.groups, kDepthwisePlanes) : channels_that_fit(lines(p.groups), p.groups, element);
  d.lines = lines(d.block_channels);
  d.grad_lines = d.lines;
  d.grad_lines.step_w = 1, d.grad_lines.origin_w = 0, d.grad_lines.columns = p.cols;
  d.grad_lines.size = d.lines.pitch * d.lines.pixel;
  d.grad_in_place = can_read_in_place(d.lines, p.grad, p.groups, dtype);
  ColumnRange read;
  read.add(p.planes, p.taps, p.num_taps);
  read_in_place(d.lines, p.source, p.groups, dtype, p.cols, read);
  d.channel_blocks = ceil_div(p.groups, d.block_channels);
  p.slices = std::min(by_column ? p.batch : ceil_div(p.batch * p.rows, kDepthwiseBlockRows),
                      ceil_div(kGradTasks, d.channel_blocks));
  return true;
}

void run_depthwise(const TapGrad& p, DepthwiseGrad& d, DType dtype) {
  const int64_t element = accumulator_size(dtype);
  // A vector of channels, or one of a channel's columns, for each tap and for the bias.
  const int64_t lanes = d.lines.by_channel ? d.block_channels + kDepthwiseVector : d.block_channels * kDepthwiseVector;
  const int64_t bytes =
      d.lines.bytes(element) + (kDepthwiseRows * d.grad_lines.size + lanes * (p.num_taps + 1)) * element;
  d.problem = &p;
  torch::stable::parallel_for(
      0, d.tasks(), std::max<int64_t>(1, kDepthwiseGrain * d.tasks() / (p.batch * p.groups * p.rows * p.cols)),
      [&](int64_t begin, int64_t end) {
        const Scratch<char> scratch(bytes);
        depthwise_kernels().run_grad[dtype](d, scratch.get(), begin, end);
      });
}

// ---- many channels a group ----

// Winograd's convolution wins where there are channels to sum over, and results to share the weight's transform. A
// block's transformed tiles take half of an L2 cache, but are so many that the weight is not read too often.
constexpr int64_t kWinogradChannels = 16, kWinogradResults = 128;
constexpr int64_t kWinogradBytes = 256 << 10, kWinogradBlock = 32;
constexpr int64_t kWinogradOwnTiles = 128, kWinogradOwnBlocks = 2;  // of a problem whose blocks pack their own weights
constexpr int64_t kWinogradGrain = 16 << 10;  // elements of the weight a thread packs at the least

constexpr int64_t kWinogradGradProducts = 2016;  // of a channel, in a block of the weight's gradient

// Which of Winograd's convolutions may be used, see fastnn/backends.py.
enum class Winograd { kOff, kDefault, kFast };
std::atomic<Winograd> winograd_setting = Winograd::kDefault;

// A 3 x 3 window that moves by one.
bool is_window(const Planes& p, int64_t taps) {
  return taps == 9 && p.step_h == 1 && p.step_w == 1 && p.halo_h == 2 && p.halo_w == 2;
}

// Tiles of side x side results.
WinogradConv winograd_conv(const TapConv& p, int64_t side) {
  WinogradConv w{};
  w.conv = p;
  w.side = side;
  const int64_t windows = side / 2;
  w.tile_rows = p.result.pool_code ? ceil_div(p.result.pool.out_h, windows) : ceil_div(p.rows, side);
  w.tile_cols = p.result.pool_code ? ceil_div(p.result.pool.out_w, windows) : ceil_div(p.cols, side);
  return w;
}

// Tiles of 4 x 4 take fewer multiplications, where not too much of them lies outside of the result; they round more.
int64_t tile_side(const TapConv& p) {
  const auto products = [&](int64_t side) {
    const WinogradConv w = winograd_conv(p, side);
    return w.products() * w.tiles();
  };
  return winograd_setting == Winograd::kFast && 4 * products(4) < 3 * products(2) ? 4 : 2;
}

// Whether a window's terms, multiplied two by two, take no longer than the transformed ones, which are float32.
bool pairs_take_no_longer(const WinogradConv& w, DType dtype) {
  const TapConv& p = w.conv;
  return conv_kernels().terms[dtype] > 1 &&
         (w.side == 2 || 2 * w.products() * w.tiles() > 9 * p.batch * p.rows * p.cols);
}

// Whether it is for a problem: windows of 3 x 3 that move by one, and many.
bool is_winograd(const WinogradConv& w, DType dtype) {
  const TapConv& p = w.conv;
  return winograd_setting != Winograd::kOff && is_window(p.planes, p.num_taps) &&
         std::min(p.group_channels, p.group_results) >= kWinogradChannels && w.results() >= kWinogradResults &&
         !pairs_take_no_longer(w, dtype);
}

// False where it is not for this problem, which may be pooled by tiles.
bool plan_winograd(const TapConv& p, DType dtype, const void* weight, const std::array<int64_t, 3>& strides,
                   WinogradConv& w) {
  const PoolShape& pool = p.result.pool;
  const bool by_tiles =
      !p.result.pool_code || (pool.kernel_h == 2 && pool.kernel_w == 2 && pool.stride_h == 2 && pool.stride_w == 2);
  w = winograd_conv(p, tile_side(p));
  w.conv.weight = weight, std::copy(strides.begin(), strides.end(), w.weight_strides);
  return is_winograd(w, dtype) && by_tiles && (p.result.stride.c == 1 || p.result.stride.w == 1);
}

// False where a result was not finite: then none may be used.
bool run_winograd(WinogradConv& w, DType dtype) {
  const WinogradKernels& kernels = winograd_kernels();
  const WinogradTileKernels& of_side = kernels.of_side[w.side == 4];
  const TapConv& p = w.conv;
  const int64_t element = accumulator_size(dtype), width = kernels.gemm_results[element == 4];
  const int64_t fit = std::max(kWinogradBlock, kWinogradBytes / (w.products() * p.group_channels * element));
  const int64_t own_fit = std::max(kWinogradOwnTiles, fit);
  const bool own_weights = ceil_div(w.tiles(), own_fit) <= kWinogradOwnBlocks;
  const int64_t blocks = ceil_div(w.tiles(), own_weights ? own_fit : fit);
  w.block_tiles = ceil_div(ceil_div(w.tiles(), blocks), kernels.gemm_tiles) * kernels.gemm_tiles;
  // Too few blocks for the threads: they share a block's result channels.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t splits = threads == 1 ? 1 : ceil_div(2 * threads, blocks * p.groups);
  w.group_runs = ceil_div(p.group_results, width);
  w.block_runs = ceil_div(w.group_runs, splits);
  w.run_product = (ceil_div(p.group_channels * width, 16) | 1) * 16;  // an odd number of cache lines: see set_block

  // Few blocks pack a run's weights where they use them: those never leave the cache.
  const int64_t runs = p.groups * w.group_runs, run_size = w.products() * w.run_product;
  const Scratch<char> packed(own_weights ? 0 : runs * run_size * element);
  if (!own_weights) {
    torch::stable::parallel_for(
        0, runs, std::max<int64_t>(1, kWinogradGrain / run_size),
        [&](int64_t begin, int64_t end) { of_side.pack_weight[dtype](w, packed.get(), begin, end); });
    w.packed = packed.get();
  }
  w.scratch = of_side.scratch[dtype](w);
  return run_finite_tasks(w, of_side.run[dtype]);
}

// False where it is not for this problem.
bool plan_winograd(TapGrad& p, DType dtype, WinogradGrad& g) {
  TapConv conv{};
  conv.source = p.source, conv.planes = p.planes, conv.num_taps = p.num_taps;
  conv.batch = p.batch, conv.rows = p.rows, conv.cols = p.cols;
  conv.group_channels = p.group_channels, conv.group_results = p.group_results;
  WinogradConv& w = g.source;
  w = winograd_conv(conv, tile_side(conv));
  if (!is_winograd(w, dtype)) return false;
  p.form = GradForm::position_lanes;
  p.block_groups = 1;
  p.block_results = std::min(p.group_results, kWinogradGradResults);
  p.block_channels = w.conv.group_channels = std::min(p.group_channels, kWinogradGradChannels);
  p.channel_blocks =
      p.groups * ceil_div(p.group_results, p.block_results) * ceil_div(p.group_channels, p.block_channels);
  // Whole rows of tiles, or an even part of one.
  const int64_t most = kWinogradGradProducts / w.products();
  w.block_tiles =
      w.tile_cols < most ? most / w.tile_cols * w.tile_cols : ceil_div(w.tile_cols, ceil_div(w.tile_cols, most));
  p.slices = count_slices(p, g.blocks(), accumulator_size(dtype));
  return true;
}

// False where a sum was not finite, as in the forward pass.
bool run_winograd(const TapGrad& p, DType dtype, WinogradGrad& g) {
  g.grad = p;
  const WinogradTileKernels& of_side = winograd_kernels().of_side[g.source.side == 4];
  g.scratch = of_side.grad_scratch[dtype](g);
  return run_finite_tasks(g, of_side.run_grad[dtype]);
}

constexpr int64_t kPointBytes = 256 << 10;  // of a block of pixels, in the L2 cache
constexpr int64_t kPointTransposed = 110;   // products an element that is transposed takes part in, at the least

// False where the taps are no window of neighbouring pixels or its pixels not the rows of a matrix, and where planes
// serve a window better.
bool plan_pointwise(const TapConv& p, DType dtype, PointConv& w) {
  const Planes& s = p.planes;
  w.conv = p;
  w.window_h = w.window_w = 0;
  for (const Tap* tap = p.taps; tap < p.taps + p.num_taps; ++tap) {
    w.window_h = std::max(w.window_h, tap->row * s.step_h + s.phase_h[tap->phase] + 1);
    w.window_w = std::max(w.window_w, tap->col * s.step_w + s.phase_w[tap->phase] + 1);
  }
  w.padded = s.origin_h > 0 || s.origin_w > 0 || (p.rows - 1) * s.step_h + w.window_h - s.origin_h > p.source.height ||
             (p.cols - 1) * s.step_w + w.window_w - s.origin_w > p.source.width;
  const bool pixels = contiguous_along(&Strides4::c, p.source), columns = contiguous_along(&Strides4::w, p.source);
  w.by_column = p.num_taps == 1 && !p.result.pool_code && !w.padded && s.origin_h == 0 && s.origin_w == 0 && columns &&
                p.result.stride.w == 1 && s.step_w == 1 && !(pixels && p.result.stride.c == 1);
  if (p.groups > 1 || w.window_h * w.window_w != p.num_taps || !(pixels || columns) ||
      !(p.result.stride.c == 1 || p.result.stride.w == 1))
    return false;
  // Vectors of results are partly empty here, vectors of a plane's positions where there is padding between its rows.
  const int64_t element = accumulator_size(dtype), panel = pointwise_kernels().panel[element == 4];
  const int64_t results = ceil_div(p.group_results, panel / 2) * (panel / 2);
  if (p.num_taps > 1 && p.group_results * s.pitch < results * p.cols) return false;
  // Of NCHW, pixels and results are transposed, which takes enough products to be worth it.
  const int64_t transposed =
      (pixels ? 0 : s.step_h * s.step_w * p.group_channels) + (p.result.stride.c == 1 ? 0 : p.group_results);
  return w.by_column || p.num_taps == 1 ||
         p.group_channels * p.group_results * p.num_taps >= kPointTransposed * transposed;
}

void run_pointwise(PointConv& w, DType dtype, const Tensor& weight, std::array<int64_t, 3> strides) {
  const PointwiseKernels& kernels = pointwise_kernels();
  TapConv& p = w.conv;
  const Planes& s = p.planes;
  const int64_t element = accumulator_size(dtype), panel = kernels.panel[element == 4], rows = kernels.rows;
  const int64_t width = w.by_column ? rows : panel, blocks = ceil_div(p.group_results, width);
  const int64_t threads = torch::stable::get_num_threads();
  if (w.by_column) {
    p.image_blocks = 1, p.row_blocks = ceil_div(p.batch * p.rows * p.cols, panel);
    w.scratch = (p.group_channels + rows) * panel * element;
  } else {
    // Pixels of a block: a window's rows above and below it are not counted.
    const int64_t pixel = s.step_h * s.step_w * p.group_channels * element / conv_kernels().terms[dtype];
    const bool pooled = p.result.pool_code != nullptr;
    const int64_t bytes = p.result.stride.c == 1 && !pooled ? pixel : std::max(pixel, panel * element);
    const int64_t fit = std::max(rows, kPointBytes / bytes / rows * rows);
    w.block_cols = pooled ? p.cols : std::min(fit, p.cols);
    w.block_rows = p.num_taps == 1 && !pooled ? 1 : std::max<int64_t>(1, fit / p.cols);
    while (w.block_rows > w.window_h && p.batch * ceil_div(p.rows, w.block_rows) < 4 * threads)
      w.block_rows = ceil_div(w.block_rows, 2);
    const Cut cut = cut_rows(p.rows, w.block_rows, p.result.pool);
    w.block_rows = cut.block;
    p.image_blocks = p.batch, p.row_blocks = cut.blocks;
    const int64_t source_rows = (w.block_rows - 1) * s.step_h + w.window_h;
    const int64_t source_cols = (w.block_cols - 1) * s.step_w + w.window_w;
    // Behind copied pixels, what their transposes may write past them; sums of a panel, and as many as a vector has
    // lanes.
    w.scratch = ((source_rows * source_cols + 8) * p.group_channels +
                 (w.block_rows * ceil_div(w.block_cols, rows) * rows + panel / 2) * panel) *
                element;
  }
  p.channel_blocks = std::min(blocks, ceil_div(2 * threads, p.image_blocks * p.row_blocks));
  const int64_t depth = p.group_channels * p.num_taps;
  const Scratch<char> packed(blocks * width * depth * element);
  torch::stable::parallel_for(0, blocks, ceil_div(4096, width * depth), [&](int64_t begin, int64_t end) {
    kernels.pack_weight[dtype](w, width, weight.data_ptr(), strides.data(), packed.get(), begin, end);
  });
  p.weight = packed.get();
  run_tasks(w, kernels.run[dtype]);
}

constexpr int64_t kSpreadBytes = 384 << 10;  // of an image's pixels, products and sums, in the L2 cache

// The gradient of an input that is so much larger than the output that most of what its pixels would sum is padding.
// False where it is not, or where an image is too large or has too few results to fill its vectors.
bool run_spread(const ConvShape& s, DType dtype, const ConvSource& grad, const Tensor& weight, const Tensor& result) {
  const PointwiseKernels& kernels = pointwise_kernels();
  const int64_t element = accumulator_size(dtype), lanes = conv_kernels().lanes[element == 4];
  PointSpread w{};
  TapConv& p = w.conv;
  p.source = grad;
  p.result.data = result.data_ptr(), p.result.stride = strides4(result);
  p.batch = s.batch, p.groups = 1, p.group_channels = s.out_channels, p.group_results = s.in_channels;
  p.rows = s.out_h, p.cols = s.out_w;
  w.kernel_h = s.kernel_h, w.kernel_w = s.kernel_w, w.pad_top = s.pad_top, w.pad_left = s.pad_left;
  w.height = s.in_h, w.width = s.in_w;
  const int64_t panels = w.panels(lanes), positions = p.rows * p.cols;
  const int64_t products = 2 * panels * lanes * positions;
  const bool fewer = 3 * products < 2 * s.in_h * s.in_w * s.kernel_h * s.kernel_w * s.in_channels;
  const bool plain = s.groups == 1 && s.stride_h * s.stride_w == 1 && s.dilation_h * s.dilation_w == 1;
  const int64_t sums = (p.rows + w.kernel_h - 1) * w.sums_width() * p.group_results + (p.group_results + 1) * lanes;
  w.scratch = ((positions + kernels.rows) * 2 * lanes + sums + (positions + 8) * p.group_channels) * element;
  const bool layouts = (contiguous_along(&Strides4::c, grad) || contiguous_along(&Strides4::w, grad)) &&
                       (p.result.stride.c == 1 || p.result.stride.w == 1);
  const bool winograd = s.kernel_h == 3 && s.kernel_w == 3;  // which takes fewer products yet
  if (!plain || winograd || !fewer || !layouts || w.scratch > kSpreadBytes) return false;
  const int64_t depth = ceil_div(p.group_channels, conv_kernels().terms[dtype]);
  const Scratch<char> packed(panels * depth * 2 * lanes * element);
  const std::array<int64_t, 4> strides{weight.stride(1), weight.stride(0), weight.stride(2), weight.stride(3)};
  torch::stable::parallel_for(0, panels, ceil_div(4096, depth * 2 * lanes), [&](int64_t begin, int64_t end) {
    kernels.pack_spread_weight[dtype](w, weight.data_ptr(), strides.data(), packed.get(), begin, end);
  });
  p.weight = packed.get();
  run_tasks(w, kernels.run_spread[dtype]);
  return true;
}

// Runs problems that differ in taps, positions and result alone, the first of which has the most rows: planes that have
// the padding of all of them are packed once.
void run_planes(std::vector<TapConv>& phases, DType dtype, const Tensor& weight, std::array<int64_t, 3> strides) {
  const ConvKernels& kernels = conv_kernels();
  const int64_t element = accumulator_size(dtype);
  TapConv& p = phases.front();
  Planes planes = p.planes;
  int64_t cols = 0, num_taps = 0;
  for (const TapConv& phase : phases) {
    planes.origin_h = std::max(planes.origin_h, phase.planes.origin_h);
    planes.origin_w = std::max(planes.origin_w, phase.planes.origin_w);
    cols = std::max(cols, phase.cols), num_taps += phase.num_taps;
  }
  for (TapConv& phase : phases) {
    for (Tap* tap = phase.taps; tap < phase.taps + phase.num_taps; ++tap) {
      tap->row += planes.origin_h - phase.planes.origin_h, tap->col += planes.origin_w - phase.planes.origin_w;
      planes.halo_h = std::max(planes.halo_h, tap->row), planes.halo_w = std::max(planes.halo_w, tap->col);
    }
    phase.next = &phase == &phases.back() ? nullptr : &phase + 1;
  }
  set_pitch(planes, p.source.width, cols);
  p.planes = planes;
  const int64_t depth = ceil_div(p.group_channels, kernels.terms[dtype]), size = p.groups * p.group_results * depth;
  plan(p, depth, element, kernels.lanes[element == 4], kernels.tile_results);
  const Scratch<char> packed(size * num_taps * element);
  const int64_t blocks = p.groups * ceil_div(p.group_results, kernels.tile_results);
  char* of_phase = packed.get();
  for (TapConv& phase : phases) {
    if (&phase != &p) {
      TapConv planned = p;
      planned.taps = phase.taps, planned.num_taps = phase.num_taps, planned.next = phase.next;
      planned.rows = phase.rows, planned.cols = phase.cols, planned.result = phase.result;
      phase = planned;
    }
    phase.weight = of_phase;
    torch::stable::parallel_for(
        0, blocks, std::max<int64_t>(1, 4096 / (p.group_channels * phase.num_taps)), [&](int64_t begin, int64_t end) {
          kernels.pack_weight[dtype](phase, weight.data_ptr(), strides.data(), of_phase, begin, end);
        });
    of_phase += size * phase.num_taps * element;
  }
  run_tasks(p, kernels.run[dtype]);
}

// Runs the problems, phases of one gradient if they are several, of which some have no taps. Strides of the weight: of
// group, result channel, reduced channel.
void run_conv(std::vector<TapConv>& phases, DType dtype, const Tensor& weight, std::array<int64_t, 3> strides) {
  const auto served = [&](const TapConv& p) {
    if (p.num_taps == 0) return true;
    WinogradConv winograd;
    if (plan_winograd(p, dtype, weight.data_ptr(), strides, winograd) && run_winograd(winograd, dtype)) return true;
    PointConv points;
    if (!plan_pointwise(p, dtype, points)) return false;
    run_pointwise(points, dtype, weight, strides);
    return true;
  };
  phases.erase(std::remove_if(phases.begin(), phases.end(), served), phases.end());
  if (!phases.empty()) run_planes(phases, dtype, weight, strides);
}

std::vector<Tap> all_taps(const ConvShape& s, const Tensor& weight) {
  std::vector<Tap> taps;
  taps.reserve(size_t(s.kernel_h * s.kernel_w));
  for (int64_t r = 0; r < s.kernel_h; ++r)
    for (int64_t q = 0; q < s.kernel_w; ++q)
      taps.push_back({0, r * s.dilation_h, q * s.dilation_w, r * weight.stride(2) + q * weight.stride(3)});
  return taps;
}

Planes input_planes(const ConvShape& s) {
  Planes p{};
  p.step_h = s.stride_h, p.step_w = s.stride_w, p.origin_h = s.pad_top, p.origin_w = s.pad_left;
  return p;
}

ConvSource plain_source(const Tensor& t) {
  ConvSource source{};
  source.data = t.data_ptr(), source.stride = strides4(t), source.height = t.size(2), source.width = t.size(3);
  return source;
}

void forward(const char* op, ConvShape s, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
             bool relu, const PoolShape& pool, const Tensor& output, const Tensor* code) {
  const DType dtype = dtype_of(input, op, "input");
  const int64_t element = accumulator_size(dtype);
  Scratch<char> wide_bias((s.out_channels + kDepthwiseVector) * element);
  check_conv_bias(op, bias, input, s);
  if (bias) conv_kernels().to_accumulator[dtype](bias->data_ptr(), bias->stride(0), wide_bias.get(), s.out_channels);
  if (output.numel() == 0) return;
  std::vector<Tap> taps = all_taps(s, weight);
  std::vector<TapConv> problem(1);
  TapConv& p = problem.front();
  p.source = plain_source(input);
  p.result.data = output.data_ptr();
  p.result.stride = strides4(output);
  if (!code) join_rows(s, {&p.source}, {&p.result.stride});
  p.planes = input_planes(s);
  plan_planes(p.planes, taps, s.in_w, s.out_w);
  p.taps = taps.data(), p.num_taps = int64_t(taps.size());
  p.batch = s.batch, p.groups = s.groups, p.group_channels = s.group_in(), p.group_results = s.group_out();
  p.rows = s.out_h, p.cols = s.out_w;
  if (code) {
    p.result.pool_code = static_cast<uint8_t*>(code->data_ptr());
    p.result.code_stride = strides4(*code);
    p.result.pool = pool;
    // Of the results those that a window has.
    p.rows = (pool.out_h - 1) * pool.stride_h + pool.kernel_h,
    p.cols = (pool.out_w - 1) * pool.stride_w + pool.kernel_w;
  }
  p.bias = bias ? wide_bias.get() : nullptr, p.relu = relu;
  const std::array<int64_t, 3> strides{s.group_out() * weight.stride(0), weight.stride(0), weight.stride(1)};
  if (!run_depthwise(problem, 1, 1, p.result.stride, dtype, weight, strides)) run_conv(problem, dtype, weight, strides);
}

Tensor conv2d(Tensor input, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding, Ints dilation,
              int64_t groups, bool relu) {
  const char* op = "conv2d";
  const ConvShape s = few_phases(op, conv_shape(op, input, weight, stride, padding, dilation, groups));
  const Tensor output =
      empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, result_is_channels_last(input, weight));
  forward(op, s, input, weight, bias, relu, PoolShape{}, output, nullptr);
  return output;
}

std::tuple<Tensor, Tensor> conv2d_relu_max_pool2d(Tensor input, Tensor weight, std::optional<Tensor> bias, Ints stride,
                                                  Ints padding, Ints dilation, int64_t groups, Ints pool_kernel_size,
                                                  Ints pool_stride) {
  const char* op = "conv2d_relu_max_pool2d";
  const ConvShape s = few_phases(op, conv_shape(op, input, weight, stride, padding, dilation, groups));
  const PoolShape pool = pool_shape(op, s, pool_kernel_size, pool_stride);
  const bool channels_last = result_is_channels_last(input, weight);
  const std::array<int64_t, 4> sizes{s.batch, s.out_channels, pool.out_h, pool.out_w};
  const Tensor output = empty_4d(input, sizes, channels_last);
  const Tensor code = empty_4d(input, sizes, channels_last, ScalarType::Byte);
  forward(op, s, input, weight, bias, true, pool, output, &code);
  return {output, code};
}

// ---- backward ----

// The gradient of the input: per phase of the stride, a TapConv over the output gradient with the taps that reach it.
void grad_input(ConvShape s, DType dtype, ConvSource grad, const Tensor& weight, const Tensor& result) {
  if (run_spread(s, dtype, grad, weight, result)) return;
  Strides4 stride = strides4(result);
  join_rows(s, {&grad}, {&stride});
  const int64_t phases_h = std::min(s.stride_h, s.in_h), phases_w = std::min(s.stride_w, s.in_w);
  std::vector<TapConv> phases;
  std::vector<std::vector<Tap>> phase_taps(phases_h * phases_w);
  for (int64_t a = 0; a < phases_h; ++a)
    for (int64_t b = 0; b < phases_w; ++b) {
      // Input rows a, a + stride, ...: row i of them is i * stride + a = (first_h + i) * stride + phase_h - pad, so tap
      // r reaches it if r * dilation = phase_h modulo the stride, from output row first_h + i - r * dilation / stride.
      const int64_t phase_h = (a + s.pad_top) % s.stride_h, first_h = (a + s.pad_top) / s.stride_h;
      const int64_t phase_w = (b + s.pad_left) % s.stride_w, first_w = (b + s.pad_left) / s.stride_w;
      std::vector<Tap>& taps = phase_taps[a * phases_w + b];
      int64_t last_h = 0, last_w = 0;
      for (int64_t r = 0; r < s.kernel_h; ++r)
        for (int64_t q = 0; q < s.kernel_w; ++q) {
          const int64_t row = r * s.dilation_h, col = q * s.dilation_w;
          if (row % s.stride_h != phase_h || col % s.stride_w != phase_w) continue;
          taps.push_back({0, row / s.stride_h, col / s.stride_w, r * weight.stride(2) + q * weight.stride(3)});
          last_h = std::max(last_h, taps.back().row), last_w = std::max(last_w, taps.back().col);
        }
      TapConv p{};
      for (Tap& tap : taps) tap.row = last_h - tap.row, tap.col = last_w - tap.col;
      std::reverse(taps.begin(), taps.end());
      p.planes.step_h = p.planes.step_w = 1;
      p.planes.origin_h = last_h - first_h, p.planes.origin_w = last_w - first_w;
      p.rows = ceil_div(s.in_h - a, s.stride_h), p.cols = ceil_div(s.in_w - b, s.stride_w);
      plan_planes(p.planes, taps, grad.width, p.cols);
      p.source = grad;
      p.result.data =
          static_cast<char*>(result.data_ptr()) + (a * stride.h + b * stride.w) * int64_t(result.element_size());
      p.result.stride = {stride.n, stride.c, stride.h * s.stride_h, stride.w * s.stride_w};
      p.taps = taps.data(), p.num_taps = int64_t(taps.size());
      p.batch = s.batch, p.groups = s.groups, p.group_channels = s.group_out(), p.group_results = s.group_in();
      phases.push_back(p);
    }
  const std::array<int64_t, 3> strides{s.group_out() * weight.stride(0), weight.stride(1), weight.stride(0)};
  if (run_depthwise(phases, phases_h, phases_w, stride, dtype, weight, strides)) return;
  // A stride longer than the filter leaves phases that no tap reaches.
  if (s.kernel_h < s.stride_h || s.kernel_w < s.stride_w || s.dilation_h > 1 || s.dilation_w > 1) {
    Tensor zeroed = result;
    torch::stable::zero_(zeroed);
  }
  run_conv(phases, dtype, weight, strides);
}

// Adds the slices of `size` sums up in place of the first.
void add_slices(DType dtype, void* sums, int64_t slices, int64_t size) {
  torch::stable::parallel_for(0, size, 16 << 10, [&](int64_t begin, int64_t end) {
    conv_kernels().add_slices[dtype](sums, slices, size, begin, end);
  });
}

void grad_weight(ConvShape s, DType dtype, const Tensor& input, const ConvSource& grad, const Tensor& weight,
                 const Tensor& weight_result, const Tensor* bias_result) {
  const ConvKernels& kernels = conv_kernels();
  const int64_t element = accumulator_size(dtype);
  std::vector<Tap> taps = all_taps(s, weight);
  TapGrad p{};
  p.source = plain_source(input);
  p.grad = grad;
  join_rows(s, {&p.source, &p.grad}, {});
  p.planes = input_planes(s);
  plan_planes(p.planes, taps, s.in_w, s.out_w);
  p.taps = taps.data(), p.num_taps = int64_t(taps.size());
  p.batch = s.batch, p.groups = s.groups, p.group_channels = s.group_in(), p.group_results = s.group_out();
  p.rows = s.out_h, p.cols = s.out_w;
  // Runs a planned kernel and adds its slices up. False where the kernel says so.
  const auto sum = [&](auto run) {
    const int64_t count = s.out_channels * s.group_in() * p.num_taps;
    const Scratch<char> sums(p.slices * count * element), bias_sums(p.slices * s.out_channels * element);
    p.weight_sums = sums.get();
    p.bias_sums = bias_result ? bias_sums.get() : nullptr;
    if (!run()) return false;
    add_slices(dtype, p.weight_sums, p.slices, count);
    if (bias_result) add_slices(dtype, p.bias_sums, p.slices, s.out_channels);
    void* bias = bias_result ? bias_result->data_ptr() : nullptr;
    torch::stable::parallel_for(
        0, s.out_channels, ceil_div(16 * 1024, count / s.out_channels),
        [&](int64_t begin, int64_t end) { kernels.write_sums[dtype](p, weight_result.data_ptr(), bias, begin, end); });
    return true;
  };
  DepthwiseGrad depthwise{};
  WinogradGrad winograd{};
  if (plan_depthwise(p, dtype, depthwise)) {
    sum([&] { return run_depthwise(p, depthwise, dtype), true; });
  } else if (!plan_winograd(p, dtype, winograd) || !sum([&] { return run_winograd(p, dtype, winograd); })) {
    plan(p, kernels.terms[dtype], element, kernels.lanes[element == 4], kernels.lane_vectors);
    sum([&] { return run_tasks(p, kernels.run_grad[dtype]), true; });
  }
}

// Result channels whose entries are listed at a time, and windows: the input gradient's lists share the L1 cache with
// the filters, the weight gradient's with the pixels they reach. Packed rows and sums stay in the L2 cache.
constexpr int64_t kPooledResults = 64, kPooledMasks = 64, kPooledWindows = 128;
constexpr int64_t kPooledNear = 16 << 10, kPooledRows = 256 << 10, kPooledSums = 256 << 10;
constexpr int64_t kPooledSliceWindows = 512;  // at the least: fewer would be less work than their sums

void plan_pixels(PooledGrad& p, int64_t rows) {
  p.pixel_elements = ceil_div(rows * p.pitch() * p.conv.group_in() + 16, 16) * 16;
}

// False if the weights are not finite: the pass leaves out zeros that they would turn into NaN.
bool pooled_grad_input(PooledGrad p, DType dtype, const Tensor& weight, const Tensor& result) {
  const int64_t element = accumulator_size(dtype), lanes = conv_kernels().lanes[element == 4];
  const int64_t threads = torch::stable::get_num_threads(), blocks = ceil_div(p.conv.group_out(), kPooledResults);
  p.pixels = result.data_ptr();
  p.pixel_stride = strides4(result);
  p.block_results = ceil_div(p.conv.group_out(), blocks);
  p.block_cols = std::clamp<int64_t>(kPooledMasks / p.codes(), 1, p.pool.out_w);
  p.row_blocks = std::clamp<int64_t>(ceil_div(2 * threads, p.conv.batch), 1, std::max<int64_t>(1, p.pool.out_h / 4));
  plan_pixels(p, std::max(p.span_h(), p.row_step()));
  p.scratch = (p.pixel_elements + ceil_div(p.block_cols * p.block_results + 16, 16) * 16) * element +
              p.block_cols * (p.codes() * 8 + 64);
  const Scratch<char> packed(p.conv.out_channels * p.result_sums(lanes) * element);
  const std::array<int64_t, 4> strides{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  std::atomic<bool> finite = true;
  torch::stable::parallel_for(0, p.conv.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    if (!pooled_kernels().pack_weight[dtype](p, weight.data_ptr(), strides.data(), packed.get(), begin, end))
      finite = false;
  });
  if (!finite) return false;
  p.weight = packed.get();
  torch::stable::parallel_for(0, p.conv.batch * p.row_blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch(p.scratch);
    pooled_kernels().run_input[dtype](p, scratch.get(), begin, end);
  });
  return true;
}

// False, likewise, if the input is not finite.
bool pooled_grad_weight(PooledGrad p, DType dtype, const Tensor& input, const Tensor& weight_result,
                        const Tensor* bias_result) {
  const int64_t element = accumulator_size(dtype), lanes = conv_kernels().lanes[element == 4];
  const ConvShape& s = p.conv;
  p.pixels = input.data_ptr();
  p.pixel_stride = strides4(input);
  const auto packed_rows = [&](int64_t rows) { return (rows - 1) * p.row_step() + p.span_h(); };
  p.pack_rows = p.pool.out_h;
  while (p.pack_rows > 1 && packed_rows(p.pack_rows) * p.pitch() * s.group_in() * element > kPooledRows) --p.pack_rows;
  p.pack_rows = ceil_div(p.pool.out_h, ceil_div(p.pool.out_h, p.pack_rows));
  // What a run's entries reach in `rows` x `cols` windows.
  const auto near = [&](int64_t rows, int64_t cols) {
    const int64_t height = (rows - 1) * p.row_step() + (p.pool.kernel_h - 1) * s.stride_h + 1;
    return height * cols * p.col_step() * p.width * element <= kPooledNear && rows * cols <= kPooledWindows;
  };
  int64_t splits = 1;
  while (p.pool.out_w > 4 * splits && !near(1, ceil_div(p.pool.out_w, splits))) ++splits;
  p.block_cols = ceil_div(p.pool.out_w, splits);
  p.block_rows = 1;
  while (p.block_rows < p.pack_rows && near(p.block_rows + 1, p.block_cols)) ++p.block_rows;
  const int64_t result_sums = p.result_sums(lanes);
  p.block_results = std::clamp<int64_t>(kPooledSums / (result_sums * element), kPooledResults / 2, kPooledResults);
  const int64_t blocks = ceil_div(s.group_out(), p.block_results);
  p.block_results = ceil_div(s.group_out(), blocks);
  plan_pixels(p, packed_rows(p.pack_rows));
  p.list_capacity = p.block_rows * p.block_cols + 1;
  p.scratch = (p.pixel_elements + p.block_results * p.list_capacity * 2) * element + p.block_results * 8;
  p.slices = std::min({s.batch * p.pool.out_h, ceil_div(kGradTasks, s.groups * blocks),
                       ceil_div(s.batch * p.pool.out_h * p.pool.out_w, kPooledSliceWindows)});
  const int64_t tasks = p.slices * s.groups * blocks;
  const Scratch<char> weight_sums(p.slices * s.out_channels * result_sums * element);
  const Scratch<char> bias_sums(p.slices * s.out_channels * element);
  const Scratch<bool> finite(tasks);
  p.weight_sums = weight_sums.get(), p.bias_sums = bias_sums.get(), p.finite = finite.get();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch(p.scratch);
    pooled_kernels().run_weight[dtype](p, scratch.get(), begin, end);
  });
  if (!std::all_of(p.finite, p.finite + tasks, [](bool b) { return b; })) return false;
  add_slices(dtype, p.weight_sums, p.slices, s.out_channels * result_sums);
  if (bias_result) add_slices(dtype, p.bias_sums, p.slices, s.out_channels);
  void* bias = bias_result ? bias_result->data_ptr() : nullptr;
  torch::stable::parallel_for(0, s.out_channels, ceil_div(16 * 1024, result_sums), [&](int64_t begin, int64_t end) {
    pooled_kernels().write_sums[dtype](p, weight_result.data_ptr(), bias, begin, end);
  });
  return true;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(Tensor grad_output, Tensor input, Tensor weight,
                                                   std::optional<Tensor> relu_output, std::optional<Tensor> pool_code,
                                                   Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                   Ints pool_kernel_size, Ints pool_stride,
                                                   std::vector<bool> output_mask) {
  const char* op = "conv2d_backward";
  const ConvShape s = few_phases(op, conv_shape(op, input, weight, stride, padding, dilation, groups));
  const DType dtype = dtype_of(input, op, "input");
  PooledGrad pooled{};
  pooled.pool = check_conv_gradient(op, grad_output, input, s, relu_output, pool_code, pool_kernel_size, pool_stride,
                                    output_mask);
  ConvSource grad = plain_source(grad_output);
  if (pool_code) {
    pooled.conv = s;
    pooled.grad = grad.data, pooled.grad_stride = grad.stride;
    pooled.code = static_cast<const uint8_t*>(pool_code->data_ptr()), pooled.code_stride = strides4(*pool_code);
    pooled.width = std::min<int64_t>(s.group_in(), 4 * conv_kernels().lanes[accumulator_size(dtype) == 4]);
  } else if (relu_output) {
    grad.relu_output = relu_output->data_ptr();
    grad.relu_stride = strides4(*relu_output);
  }

  const auto none = [&] { return empty({0}, input.scalar_type()); };
  Tensor input_result =
      output_mask[0] ? empty_4d(input, {s.batch, s.in_channels, s.in_h, s.in_w}, result_is_channels_last(input, weight))
                     : none();
  Tensor weight_result =
      output_mask[1] ? empty_4d(weight, {s.out_channels, s.group_in(), s.kernel_h, s.kernel_w}, false) : none();
  Tensor bias_result = none();
  if (output_mask[2]) bias_result = empty({s.out_channels}, input.scalar_type());

  if (grad_output.numel() == 0 || input.numel() == 0) {
    for (Tensor* t : {&input_result, &weight_result, &bias_result}) torch::stable::zero_(*t);
    return {input_result, weight_result, bias_result};
  }
  // A pass that cannot do without the pooled gradient's zeros gets them.
  Tensor plain;
  const auto with_zeros = [&]() -> const ConvSource& {
    if (pool_code && !plain.defined()) {
      plain = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, false);
      torch::stable::parallel_for(0, s.batch * s.out_channels, 1, [&](int64_t begin, int64_t end) {
        pooled_kernels().scatter[dtype](pooled, plain.data_ptr(), begin, end);
      });
      grad = plain_source(plain);
    }
    return grad;
  };
  if (output_mask[0] && !(pool_code && pooled_grad_input(pooled, dtype, weight, input_result)))
    grad_input(s, dtype, with_zeros(), weight, input_result);
  if (output_mask[1] || output_mask[2]) {
    // The bias gradient is summed on the way of the weight gradient.
    if (!output_mask[1])
      weight_result = empty_4d(weight, {s.out_channels, s.group_in(), s.kernel_h, s.kernel_w}, false);
    Tensor* const bias = output_mask[2] ? &bias_result : nullptr;
    if (!(pool_code && pooled_grad_weight(pooled, dtype, input, weight_result, bias)))
      grad_weight(s, dtype, input, with_zeros(), weight, weight_result, bias);
    if (!output_mask[1]) weight_result = none();
  }
  return {input_result, weight_result, bias_result};
}

}  // namespace

void bind_conv2d(pybind11::module_& m) {
  define_entry(m, "conv2d", &conv2d);
  define_entry(m, "conv2d_relu_max_pool2d", &conv2d_relu_max_pool2d);
  define_entry(m, "conv2d_backward", &conv2d_backward);
  m.def("winograd", [] { return int(winograd_setting.load()); });
  m.def("set_winograd", [](int setting) { winograd_setting = Winograd(setting); });
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("conv2d_relu_max_pool2d", TORCH_BOX(&conv2d_relu_max_pool2d));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
}

}  // namespace fastnn::cpu
