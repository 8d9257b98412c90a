// Normalisation: one pass over x, which writes y.
//
//     vectors of channels --the block computes--> lines, columns x CHANNELS, in shared memory
//                         --each thread copies--> its CHANNELS lines, in registers
//     items of x          --one line each-------> items of y, at the same indices
//
// `threads.cuh` has a sketch of items and of their distribution over threads.

// The line by which the values of a channel are normalised: y = (x * before - center) * scale + shift. The center is
// the mean rounded to the dtype of the line, so the difference is exact where x is near the mean; the shift contains
// the rounding error. `before` is a power of two, nearly always 1; the scale is divided by it where it would leave the
// range.
struct Line {
    Output before, center, scale, shift;

    __device__ static Line of(const Stats& stats, Index channel, const STATISTIC* weight, const STATISTIC* bias,
                              double eps) {
        Scale scale = stats.invstd_of(channel, eps);
        if (weight) scale = scale.times(weight[channel]);
        const int unit = stats.unit_of(channel);
        const double hi = stats.mean_of(channel), lo = stats.rest_of(channel);
        const Output center = static_cast<Output>(clamped(hi + lo, Range<Output>::MOST));
        const double own = bias ? static_cast<double>(bias[channel]) : 0;
        if (scale.number == 0) return {0, 0, 0, static_cast<Output>(own)};
        const double shift = scalbn((center - hi - lo) * scale.number, scale.exponent + unit) + own;
        const int before = exponent_before<Output>(scale, center, unit);
        const double origin = scalbn(static_cast<double>(center), unit + before);
        return {static_cast<Output>(power(before)), static_cast<Output>(origin),
                scale.over<Output>(before), static_cast<Output>(shift)};
    }
};

// Normalise the next N items of a thread: read all of them first, so that their loads overlap; then compute and write
// one after another.
template <int N>
__device__ __forceinline__ void normalize_items(const Line (&lines)[CHANNELS], Walk& walk, Values& x, Results& y,
                                                Counts& weights) {
    Item items[N];
    Weights own[N];
    bool wraps[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        items[i] = x.load();
        own[i].load(weights);
        wraps[i] = walk.advance();
        x.advance(wraps[i]);
        weights.advance(wraps[i]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        Item result;
#pragma unroll
        for (int channel = 0; channel < CHANNELS; ++channel) {
#pragma unroll
            for (int position = 0; position < POSITIONS; ++position) {
                const Line& line = lines[channel];
                const Output deviation = items[i].at(channel, position) * line.before - line.center;
                const Output value = deviation * line.scale + line.shift;
                // A value of weight 0 gives 0, even if it is NaN.
                narrow(own[i].counts(position) ? value : 0, result.values[channel * POSITIONS + position]);
            }
        }
        y.store(result);
        y.advance(wraps[i]);
    }
}

// Write y = (x - mean) / sqrt(var + eps) * weight + bias in the dtype VALUE, and 0 where the weight of a value is 0.
//
//     position_threads to weights_position  see threads.cuh
//     y, y_row, y_channel, y_position       written; an array of x's shape, which may be x itself
//     mean to running_var                   see Stats
//     weight, bias                          (channels,) parameters; either may be null, for 1 and 0
//     eps                                   at least 0
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    normalize(Index position_threads, Index channel_threads, Index share, Index rows, Index channels, Index positions,
              const VALUE* x, Index x_row, Index x_channel, Index x_position,  // y may be x: nothing is restricted
              VALUE* y, Index y_row, Index y_channel, Index y_position,
              const STATISTIC* weights, Index weights_row, Index weights_position,
              const double* mean, const double* rest, const double* var, const int* exponent,
              const STATISTIC* running_mean, const STATISTIC* running_var,
              const STATISTIC* weight, const STATISTIC* bias, double eps) {
    const Thread at(position_threads, channel_threads);
    __shared__ Line lines[CHANNEL_THREADS * CHANNELS];
    const Stats stats = {mean, rest, var, exponent, running_mean, running_var};
    // The lines of the block's channels: one thread computes each, for all threads of its column.
    for (int i = threadIdx.x; i < at.columns * CHANNELS; i += blockDim.x) {
        const Index channel = static_cast<Index>(blockIdx.x) * at.columns * CHANNELS + i;
        if (channel < channels) lines[i] = Line::of(stats, channel, weight, bias, eps);
    }
    __syncthreads();
    // The items of the thread: UNROLLED at a time, and the remaining items one by one.
    Walk walk(at, rows, channels, positions, share);
    if (walk.left == 0) return;
    Line mine[CHANNELS];
    for (int i = 0; i < CHANNELS; ++i) mine[i] = lines[at.column * CHANNELS + i];
    Values from(walk, at.channel, x, x_row, x_channel, x_position);
    Results to(walk, at.channel, y, y_row, y_channel, y_position);
    Counts counts(walk, 0, weights, weights_row, 0, weights_position);
    while (walk.left >= UNROLLED) normalize_items<UNROLLED>(mine, walk, from, to, counts);
    while (walk.left > 0) normalize_items<1>(mine, walk, from, to, counts);
}
