// Gradients: a pass over x and dy for sums, and one that writes dx.
//
//     `grad_sums`   items of x and dy --a thread adds up UNROLLED at a time--> Sums of its channels
//                   --a block merges its threads in a tree (merging.cuh)-----> results, blocks x channels
//     `merge_sums`  results --merged over blocks-----------------------------> sums of dy and dy * xhat, (channels,)
//     `grad_input`  vectors of channels, sums --the block computes-----------> projections, columns x CHANNELS, shared
//                   items of x and dy --by the projection of the channel-----> items of dx
//
// `threads.cuh` has a sketch of items and of their distribution over threads.

// The origin of the deviations of a channel, value * before - center. `before` is 1, or for values in float64 a power
// of two that scales deviations to near 1.
struct Origin {
    double center, before;

    __device__ static Origin of(const Stats& stats, Index channel, double eps) {
        const double center = stats.mean_of(channel) + stats.rest_of(channel);
        if constexpr (!IS_WIDE) return {center, 1};
        const int unit = stats.unit_of(channel);
        const int before = exponent_before<double>(stats.invstd_of(channel, eps), center, unit);
        return {scalbn(center, unit + before), power(before)};
    }
};

// The sums over some values of a channel: of dy, and of dy times a deviation.
struct Sums {
    double dy, product;

    __device__ __forceinline__ void merge(const Sums& other) {
        dy += other.dy;
        product += other.product;
    }
};

// Add the next N items of a thread to the sums of its channels: read all of them first, so that their loads overlap. A
// value of weight 0 is left out, and the others count once.
template <int N>
__device__ __forceinline__ void add_items(Sums (&mine)[CHANNELS], const Origin (&origins)[CHANNELS], Walk& walk,
                                          Values& x, Values& dy, Counts& weights) {
    Item xs[N], dys[N];
    Weights own[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        xs[i] = x.load();
        dys[i] = dy.load();
        own[i].load(weights);
        const bool wraps = walk.advance();
        x.advance(wraps);
        dy.advance(wraps);
        weights.advance(wraps);
    }
#pragma unroll
    for (int channel = 0; channel < CHANNELS; ++channel) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int position = 0; position < POSITIONS; ++position) {
                if (!own[i].counts(position)) continue;
                const double gradient = dys[i].at(channel, position);
                mine[channel].dy += gradient;
                double value = xs[i].at(channel, position);
                if constexpr (IS_WIDE) value *= origins[channel].before;
                mine[channel].product += gradient * (value - origins[channel].center);
            }
        }
    }
}

// Write the sums over each block's values of dy and of dy * (x * before - center).
//
//     position_threads to weights_position  see threads.cuh; dy is an array of x's shape
//     mean to running_var                   see Stats
//     eps                                   at least 0
//     results                               blocks (blockIdx.y) x channels, written
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    grad_sums(Index position_threads, Index channel_threads, Index share, Index rows, Index channels, Index positions,
              const VALUE* __restrict__ x, Index x_row, Index x_channel, Index x_position,
              const VALUE* __restrict__ dy, Index dy_row, Index dy_channel, Index dy_position,
              const STATISTIC* __restrict__ weights, Index weights_row, Index weights_position,
              const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
              const int* __restrict__ exponent, const STATISTIC* __restrict__ running_mean,
              const STATISTIC* __restrict__ running_var, double eps, Sums* __restrict__ results) {
    const Thread at(position_threads, channel_threads);
    Walk walk(at, rows, channels, positions, share);
    Values values(walk, at.channel, x, x_row, x_channel, x_position);
    Values gradients(walk, at.channel, dy, dy_row, dy_channel, dy_position);
    Counts counts(walk, 0, weights, weights_row, 0, weights_position);
    const Stats stats = {mean, rest, var, exponent, running_mean, running_var};
    Origin origins[CHANNELS] = {};
    if (walk.left > 0) {
        for (int i = 0; i < CHANNELS; ++i) origins[i] = Origin::of(stats, at.channel + i, eps);
    }
    // Accumulate: UNROLLED items at a time, and the remaining items one by one. Then reduce over the threads of each
    // column, and store.
    Sums mine[CHANNELS] = {};
    while (walk.left >= UNROLLED) add_items<UNROLLED>(mine, origins, walk, values, gradients, counts);
    while (walk.left > 0) add_items<1>(mine, origins, walk, values, gradients, counts);
    merge_threads(mine, at);
    store_result(mine, at, channels, results);
}

// Merge the sums of all blocks into those of dy and of dy * xhat, with xhat = (x - mean) / sqrt(var + eps).
//
//     channel_threads             channels of a block: its columns
//     blocks, channels            the extents of results
//     results                     blocks x channels, as `grad_sums` writes them
//     mean to running_var, eps    as for `grad_sums`
//     sum_dy, sum_dy_xhat         (channels,), written
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_sums(Index channel_threads, Index blocks, Index channels, const Sums* __restrict__ results,
               const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
               const int* __restrict__ exponent, const STATISTIC* __restrict__ running_mean,
               const STATISTIC* __restrict__ running_var, double eps, double* __restrict__ sum_dy,
               double* __restrict__ sum_dy_xhat) {
    const Thread at(1, channel_threads);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Sums all = merge_blocks(results, blocks, channel, channels, at);
    if (at.index > 0 || channel >= channels) return;
    const Stats stats = {mean, rest, var, exponent, running_mean, running_var};
    const double hi = stats.mean_of(channel), lo = stats.rest_of(channel);
    // The deviations were from the rounded mean, hi + lo: the products are corrected by the rest of the mean times the
    // sum of dy.
    const double left = (hi - (hi + lo)) + lo;
    const Scale invstd = stats.invstd_of(channel, eps);
    const int unit = stats.unit_of(channel), before = IS_WIDE ? exponent_before<double>(invstd, hi + lo, unit) : 0;
    sum_dy[channel] = all.dy;
    sum_dy_xhat[channel] = (all.product - scalbn(left, unit + before) * all.dy) * invstd.over<double>(before);
}

// The factors of the gradient of a channel, with w the weight of a value, or 1:
//
//     dx = after * scale * (dy - w * average - w * ((x * before - center) * slope + left))
//
// The average is the mean of dy, and the last term dy's projection on xhat. `before` and `after` are powers of two that
// keep all terms within the range of float64.
struct Projection {
    double after, scale, average, before, center, slope, left;

    // Return those of a channel. `weight` may be null, for 1. The sums, which are divided by n, may be null: then mean
    // and variance are constants, and only `after` and `scale` are used.
    __device__ static Projection of(const Stats& stats, Index channel, const STATISTIC* weight, double eps,
                              const double* sum_dy, const double* sum_dy_xhat, double n) {
        const Scale invstd = stats.invstd_of(channel, eps);
        const Scale scale = weight ? invstd.times(weight[channel]) : invstd;
        const int size = scale.size(), most = IS_WIDE ? Range<double>::FAR : FARTHEST;
        const int after = clamped(size - clamped(size, -most, most), Range<double>::BOTTOM, Range<double>::TOP - 1);
        Projection projection = {};
        projection.after = power(after);
        projection.scale = scale.over<double>(after);
        if (!sum_dy) return projection;
        const double hi = stats.mean_of(channel), lo = stats.rest_of(channel), center = hi + lo;
        const int unit = stats.unit_of(channel), before = exponent_before<double>(invstd, center, unit);
        // xhat = ((x - c) + (c - mean)) * invstd, with c the rounded mean: both differences are multiplied by `before`,
        // and invstd is divided by it. The second difference, times the slope, is `left`.
        projection.average = sum_dy[channel] / n;
        projection.before = power(before);
        projection.center = scalbn(center, unit + before);
        projection.slope = sum_dy_xhat[channel] / n * invstd.over<double>(before);
        projection.left = scalbn((center - hi) - lo, unit + before) * projection.slope;
        return projection;
    }
};

// Write the gradients of the next N items of a thread: read all of them first, then compute and write one after
// another. The weights are multiplied by `unit`, a power of two. If `is_constant`, mean and variance are constants, and
// x is not read.
template <int N>
__device__ __forceinline__ void grad_items(const Projection (&projections)[CHANNELS], double unit, bool is_constant,
                                           Walk& walk, Values& x, Values& dy, Results& dx, Counts& weights) {
    Item xs[N], dys[N];
    Weights own[N];
    bool wraps[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (!is_constant) xs[i] = x.load();
        dys[i] = dy.load();
        own[i].load(weights);
        wraps[i] = walk.advance();
        x.advance(wraps[i]);
        dy.advance(wraps[i]);
        weights.advance(wraps[i]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        Item result;
#pragma unroll
        for (int channel = 0; channel < CHANNELS; ++channel) {
#pragma unroll
            for (int position = 0; position < POSITIONS; ++position) {
                const Projection& projection = projections[channel];
                double gradient = dys[i].at(channel, position);
                if (!is_constant) {
                    const double w = own[i].at(position) * unit;
                    // The mean of dy, which may be large, is subtracted first, so that the difference keeps its digits.
                    gradient -= w * projection.average;
                    gradient -= w * ((xs[i].at(channel, position) * projection.before - projection.center) *
                                         projection.slope + projection.left);
                }
                gradient *= projection.scale;
                if constexpr (IS_WIDE) gradient *= projection.after;  // no other dtype leaves float64's range
                narrow(own[i].counts(position) ? gradient : 0, result.values[channel * POSITIONS + position]);
            }
        }
        dx.store(result);
        dx.advance(wraps[i]);
    }
}

// Write the gradient of x, and 0 where the weight of a value is 0.
//
//     position_threads to weights_position  see threads.cuh; dy and dx are arrays of x's shape, and dx is written
//     mean to running_var                   see Stats
//     weight                                (channels,) parameters, or null for 1
//     eps                                   at least 0
//     sum_dy, sum_dy_xhat                   (channels,), the sums of `merge_sums`, perhaps over more batches than this
//                                           one; null where mean and variance are constants
//     count                                 the number of values per channel that the sums are over, if unweighted
//     weighted_count                        one number, the sum of their weights, instead; or null
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grad_input(Index position_threads, Index channel_threads, Index share, Index rows, Index channels, Index positions,
               const VALUE* __restrict__ x, Index x_row, Index x_channel, Index x_position,
               const VALUE* __restrict__ dy, Index dy_row, Index dy_channel, Index dy_position,
               VALUE* __restrict__ dx, Index dx_row, Index dx_channel, Index dx_position,
               const STATISTIC* __restrict__ weights, Index weights_row, Index weights_position,
               const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
               const int* __restrict__ exponent, const STATISTIC* __restrict__ running_mean,
               const STATISTIC* __restrict__ running_var, const STATISTIC* __restrict__ weight, double eps,
               const double* __restrict__ sum_dy,
               const double* __restrict__ sum_dy_xhat, double count, const double* __restrict__ weighted_count) {
    const Thread at(position_threads, channel_threads);
    __shared__ Projection projections[CHANNEL_THREADS * CHANNELS];
    const Stats stats = {mean, rest, var, exponent, running_mean, running_var};
    // The divisor of the sums. The quotient by a sum of weights may leave the range, so that sum is scaled to near 1,
    // and each weight is multiplied by the same power of two.
    double n = weighted_count ? *weighted_count : count;
    if (n == 0) n = 1;  // the sums are 0 too
    const double unit = weighted_count ? power(-exponent_of(n)) : 1;
    n *= unit;
    // The projections of the block's channels: one thread computes each, for all threads of its column.
    for (int i = threadIdx.x; i < at.columns * CHANNELS; i += blockDim.x) {
        const Index channel = static_cast<Index>(blockIdx.x) * at.columns * CHANNELS + i;
        if (channel < channels) projections[i] = Projection::of(stats, channel, weight, eps, sum_dy, sum_dy_xhat, n);
    }
    __syncthreads();
    // The items of the thread: UNROLLED at a time, and the remaining items one by one.
    Walk walk(at, rows, channels, positions, share);
    if (walk.left == 0) return;
    Projection mine[CHANNELS];
    for (int i = 0; i < CHANNELS; ++i) mine[i] = projections[at.column * CHANNELS + i];
    Values values(walk, at.channel, x, x_row, x_channel, x_position);
    Values gradients(walk, at.channel, dy, dy_row, dy_channel, dy_position);
    Results to(walk, at.channel, dx, dx_row, dx_channel, dx_position);
    Counts counts(walk, 0, weights, weights_row, 0, weights_position);
    while (walk.left >= UNROLLED) grad_items<UNROLLED>(mine, unit, !sum_dy, walk, values, gradients, to, counts);
    while (walk.left > 0) grad_items<1>(mine, unit, !sum_dy, walk, values, gradients, to, counts);
}
