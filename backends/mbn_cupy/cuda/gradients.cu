// Gradients: a pass over x and dy that sums up, and one that writes dx.

// Where deviations of a channel are from, and of float64 the power of two that they are multiplied by.
struct Origin {
    double center, before;

    __device__ static Origin of(const Known& known, Index channel, double eps) {
        const double center = known.mean_of(channel) + known.rest_of(channel);
        if constexpr (!IS_WIDE) return {center, 1};
        const int unit = known.unit_of(channel);
        const int before = exponent_before<double>(known.invstd_of(channel, eps), center, unit);
        return {scalbn(center, unit + before), power(before)};
    }
};

// The sums of dy and of dy times a deviation.
struct Sums {
    double dy, product;

    __device__ __forceinline__ void merge(const Sums& other) {
        dy += other.dy;
        product += other.product;
    }
};

// Add the next items of a thread to the sums of its channels.
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

// Write the sums over each block's values of dy and of dy * (x - center): `results` is blocks x channels.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    grad_sums(Index position_lanes, Index channel_lanes, Index share, Index rows, Index channels, Index positions,
              const VALUE* __restrict__ x, Index x_row, Index x_channel, Index x_position,
              const VALUE* __restrict__ dy, Index dy_row, Index dy_channel, Index dy_position,
              const STATISTIC* __restrict__ weights, Index weights_row, Index weights_position,
              const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
              const int* __restrict__ exponent, const STATISTIC* __restrict__ running_mean,
              const STATISTIC* __restrict__ running_var, double eps, Sums* __restrict__ results) {
    const Thread at(position_lanes, channel_lanes);
    Walk walk(at, rows, channels, positions, share);
    Values values(walk, at.channel, x, x_row, x_channel, x_position);
    Values gradients(walk, at.channel, dy, dy_row, dy_channel, dy_position);
    Counts counts(walk, 0, weights, weights_row, 0, weights_position);
    const Known known = {mean, rest, var, exponent, running_mean, running_var};
    Origin origins[CHANNELS] = {};
    if (walk.left > 0) {
        for (int i = 0; i < CHANNELS; ++i) origins[i] = Origin::of(known, at.channel + i, eps);
    }
    Sums mine[CHANNELS] = {};
    while (walk.left >= UNROLLED) add_items<UNROLLED>(mine, origins, walk, values, gradients, counts);
    while (walk.left > 0) add_items<1>(mine, origins, walk, values, gradients, counts);
    merge_lanes(mine, at);
    store_result(mine, at, channels, results);
}

// Merge the sums of all blocks into those of dy and of dy * xhat.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_sums(Index channel_lanes, Index blocks, Index channels, const Sums* __restrict__ results,
               const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
               const int* __restrict__ exponent, const STATISTIC* __restrict__ running_mean,
               const STATISTIC* __restrict__ running_var, double eps, double* __restrict__ sum_dy,
               double* __restrict__ sum_dy_xhat) {
    const Thread at(1, channel_lanes);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Sums all = merge_blocks(results, blocks, channel, channels, at);
    if (at.lane > 0 || channel >= channels) return;
    const Known known = {mean, rest, var, exponent, running_mean, running_var};
    const double hi = known.mean_of(channel), lo = known.rest_of(channel);
    const double left = (hi - (hi + lo)) + lo;  // of the mean
    const Scale invstd = known.invstd_of(channel, eps);
    const int unit = known.unit_of(channel), before = IS_WIDE ? exponent_before<double>(invstd, hi + lo, unit) : 0;
    sum_dy[channel] = all.dy;
    sum_dy_xhat[channel] = (all.product - scalbn(left, unit + before) * all.dy) * invstd.over<double>(before);
}

// dx = after * scale * (dy - w * average - w * ((x * before - center) * slope + left)), where before and after are
// powers of two, for all of these to be in the range of float64.
struct Back {
    double after, scale, average, before, center, slope, left;

    // Without sums, mean and variance are constants; n is what they are divided by.
    __device__ static Back of(const Known& known, Index channel, const STATISTIC* weight, double eps,
                              const double* sum_dy, const double* sum_dy_xhat, double n) {
        const Scale invstd = known.invstd_of(channel, eps);
        const Scale scale = weight ? invstd.times(weight[channel]) : invstd;
        const int size = scale.size(), most = IS_WIDE ? Range<double>::FAR : FARTHEST;
        const int after = clamped(size - clamped(size, -most, most), Range<double>::BOTTOM, Range<double>::TOP - 1);
        Back back = {};
        back.after = power(after);
        back.scale = scale.over<double>(after);
        if (!sum_dy) return back;
        const double hi = known.mean_of(channel), lo = known.rest_of(channel), center = hi + lo;
        const int unit = known.unit_of(channel), before = exponent_before<double>(invstd, center, unit);
        back.average = sum_dy[channel] / n;
        back.before = power(before);
        back.center = scalbn(center, unit + before);
        back.slope = sum_dy_xhat[channel] / n * invstd.over<double>(before);
        back.left = scalbn((center - hi) - lo, unit + before) * back.slope;
        return back;
    }
};

// Write the gradients of the next items of a thread; weights are multiplied by a power of two.
template <int N>
__device__ __forceinline__ void grad_items(const Back (&backs)[CHANNELS], double unit, bool is_constant, Walk& walk,
                                           Values& x, Values& dy, Results& dx, Counts& weights) {
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
                const Back& back = backs[channel];
                double gradient = dys[i].at(channel, position);
                if (!is_constant) {
                    const double w = own[i].at(position) * unit;
                    // A large mean of dy goes first: what is left keeps its digits.
                    gradient -= w * back.average;
                    gradient -= w * ((xs[i].at(channel, position) * back.before - back.center) * back.slope + back.left);
                }
                gradient *= back.scale;
                if constexpr (IS_WIDE) gradient *= back.after;  // of others, float64 has the range
                narrow(own[i].counts(position) ? gradient : 0, result.values[channel * POSITIONS + position]);
            }
        }
        dx.store(result);
        dx.advance(wraps[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grad_input(Index position_lanes, Index channel_lanes, Index share, Index rows, Index channels, Index positions,
               const VALUE* __restrict__ x, Index x_row, Index x_channel, Index x_position,
               const VALUE* __restrict__ dy, Index dy_row, Index dy_channel, Index dy_position,
               VALUE* __restrict__ dx, Index dx_row, Index dx_channel, Index dx_position,
               const STATISTIC* __restrict__ weights, Index weights_row, Index weights_position,
               const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
               const int* __restrict__ exponent, const STATISTIC* __restrict__ running_mean,
               const STATISTIC* __restrict__ running_var, const STATISTIC* __restrict__ weight, double eps,
               const double* __restrict__ sum_dy,
               const double* __restrict__ sum_dy_xhat, double count, const double* __restrict__ weighted_count) {
    const Thread at(position_lanes, channel_lanes);
    __shared__ Back backs[CHANNEL_LANES * CHANNELS];
    const Known known = {mean, rest, var, exponent, running_mean, running_var};
    double n = weighted_count ? *weighted_count : count;
    if (n == 0) n = 1;  // the sums are 0 too
    const double unit = weighted_count ? power(-exponent_of(n)) : 1;  // a sum of dy divided by n may leave the range
    n *= unit;
    for (int i = threadIdx.x; i < at.columns * CHANNELS; i += blockDim.x) {
        const Index channel = static_cast<Index>(blockIdx.x) * at.columns * CHANNELS + i;
        if (channel < channels) backs[i] = Back::of(known, channel, weight, eps, sum_dy, sum_dy_xhat, n);
    }
    __syncthreads();
    Walk walk(at, rows, channels, positions, share);
    if (walk.left == 0) return;
    Back mine[CHANNELS];
    for (int i = 0; i < CHANNELS; ++i) mine[i] = backs[at.column * CHANNELS + i];
    Values values(walk, at.channel, x, x_row, x_channel, x_position);
    Values gradients(walk, at.channel, dy, dy_row, dy_channel, dy_position);
    Results to(walk, at.channel, dx, dx_row, dx_channel, dx_position);
    Counts counts(walk, 0, weights, weights_row, 0, weights_position);
    while (walk.left >= UNROLLED) grad_items<UNROLLED>(mine, unit, !sum_dy, walk, values, gradients, to, counts);
    while (walk.left > 0) grad_items<1>(mine, unit, !sum_dy, walk, values, gradients, to, counts);
}
