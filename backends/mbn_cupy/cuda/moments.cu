// Count, mean and m2 of channels, and the step of the running statistics: one pass over x, and what is left of it.

// Statistics in float64 of float64, or of what a layer in float64 has to know as well.
constexpr bool IS_EXACT = IS_WIDE || sizeof(STATISTIC) == sizeof(double);

// Of float64, the exponent of the unit that mean and rest are in; m2 is in its square.
template <bool>
struct Unit {
    static constexpr int exponent = 0;
    __device__ void set(int) {}
};
template <>
struct Unit<true> {
    int exponent;
    __device__ void set(int next) { exponent = next; }
};

// Return the exponent of a unit in which sizes of an exponent are ordinary.
__device__ __forceinline__ int unit_of(int size) {
    return size > Range<double>::FAR || size < -Range<double>::FAR ? size : 0;
}

// Count, mean (as mean + rest) and sum of squared deviations of some values.
struct Moments : Unit<IS_WIDE> {
    double count, mean, rest, m2;

    __device__ __forceinline__ double share_of(double more) const { return more / (count + more); }

    // Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
    // equations 2.1.
    __device__ __forceinline__ void merge(const Moments& other, double share) {
        if (other.count == 0) return;
        if (count == 0) {
            *this = other;
            return;
        }
        if constexpr (IS_WIDE) {
            if (exponent != 0 || other.exponent != 0 || is_far(other.mean - mean)) {
                const int one = size(), another = other.size();
                const int common = unit_of(one > another ? one : another);
                Moments theirs = other;
                theirs.set_exponent(common);
                set_exponent(common);
                add(theirs, share);
                return;
            }
        }
        add(other, share);
    }
    __device__ __forceinline__ void merge(const Moments& other) { merge(other, share_of(other.count)); }

    __device__ __forceinline__ void add(const Moments& other, double share) {
        const double difference = (other.mean - mean) + (other.rest - rest);
        m2 += other.m2 + difference * difference * (count * share);
        set_mean(mean, rest + difference * share);
        count += other.count;
    }

    // The exponent of the largest value, about; where it is not far from 1, units are 1.
    __device__ int size() const {
        const double spread = sqrt(m2 / count), largest = fabs(mean) > spread ? fabs(mean) : spread;
        return largest == 0 ? -FARTHEST : clamped(exponent_of(largest) + exponent, -FARTHEST, FARTHEST);
    }
    __device__ void set_exponent(int next) {
        const int change = exponent - next;
        mean = scalbn(mean, change);
        rest = scalbn(rest, change);
        m2 = scalbn(m2, 2 * change);
        set(next);
    }

    // Set the mean to a sum, and the rest to what rounding takes off it. Of narrower values float64 holds all that
    // statistics in float32 need.
    // Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    __device__ __forceinline__ void set_mean(double a, double b) {
        mean = a + b;
        const double b_part = mean - a, a_part = mean - b_part;
        rest = IS_EXACT ? (a - a_part) + (b - b_part) : 0;
    }
};

template <int N>
struct Run {
    Item items[N];
    Weights weights[N];

    __device__ __forceinline__ double count() const {
        double total = 0;
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int place = 0; place < PLACES; ++place) total += weights[i].at(place);
        return total;
    }

    // Moments of one channel, from deviations from a value of it. If that is an outlier, it costs digits: as many as
    // float64 has to spare for narrower values, but wide ones are gone through again, around their mean.
    // Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, equation 1.7.
    __device__ __forceinline__ Moments moments(int channel, double count) const {
        double center = 0, before = 1;  // the first value that counts
#pragma unroll
        for (int i = N * PLACES - 1; i >= 0; --i) {
            if (counts(i)) center = at(channel, i);
        }
        double total, squares;
        Moments result = {};
        if constexpr (IS_WIDE) {
            const double largest = sum_around(center, before, channel, total, squares);
            if (is_far(largest)) {
                const int size = largest > Range<double>::MOST ? FARTHEST : exponent_of(largest);
                result.set(clamped(size, -FARTHEST, FARTHEST));
                before = power(-result.exponent);
                center *= before;
                sum_around(center, before, channel, total, squares);
            }
            center += total / count;
        }
        sum_around(center, before, channel, total, squares);
        if constexpr (IS_EXACT && !IS_WIDE) {
            center += total / count;
            sum_around(center, before, channel, total, squares);
        }
        const double error = total / count;
        result.count = count;
        result.m2 = squares - total * error;
        result.set_mean(center, error);
        return result;
    }

   private:
    // Return the largest deviation, too, times before.
    __device__ __forceinline__ double sum_around(double center, double before, int channel, double& total,
                                                 double& squares) const {
        double largest = 0;
        total = squares = 0;
#pragma unroll
        for (int i = 0; i < N * PLACES; ++i) {
            if (!counts(i)) continue;
            double value = at(channel, i);
            if constexpr (IS_WIDE) value *= before;
            const double deviation = value - center;
            if constexpr (IS_WIDE) largest = fmax(largest, fabs(deviation));
            const double once = weights[i / PLACES].at(i % PLACES) * deviation;
            total += once;
            squares += once * deviation;
        }
        return largest;
    }

    __device__ __forceinline__ bool counts(int i) const { return weights[i / PLACES].counts(i % PLACES); }
    __device__ __forceinline__ double at(int channel, int i) const { return items[i / PLACES].at(channel, i % PLACES); }
};

// Read the next items of a thread, and merge their moments into those of its channels.
template <int N>
__device__ __forceinline__ void absorb(Moments (&mine)[CHANNELS], Walk& walk, Values& x, Counts& weights) {
    Run<N> run;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        run.items[i] = x.load();
        run.weights[i].load(weights);
        const bool wraps = walk.advance();
        x.advance(wraps);
        weights.advance(wraps);
    }
    const double count = run.count();
    if (count == 0) return;
    const double share = mine[0].share_of(count);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) mine[i].merge(run.moments(i, count), share);
}

// Write the moments of each block's values: `results` is blocks x channels.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    moments(Index place_lanes, Index channel_lanes, Index share, Index rows, Index channels, Index places,
            const VALUE* __restrict__ x, Index x_row, Index x_channel, Index x_place,
            const STATISTIC* __restrict__ weights, Index weights_row, Index weights_place,
            Moments* __restrict__ results) {
    const Thread at(place_lanes, channel_lanes);
    Walk walk(at, rows, channels, places, share);
    Values values(walk, at.channel, x, x_row, x_channel, x_place);
    Counts counts(walk, 0, weights, weights_row, 0, weights_place);
    Moments mine[CHANNELS] = {};
    while (walk.left >= RUN) absorb<RUN>(mine, walk, values, counts);
    while (walk.left > 0) absorb<1>(mine, walk, values, counts);
    merge_lanes(mine, at);
    store_result(mine, at, channels, results);
}

// Merge the moments of all blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_moments(Index channel_lanes, Index blocks, Index channels, const Moments* __restrict__ results,
                  double* __restrict__ count, double* __restrict__ mean, double* __restrict__ rest,
                  double* __restrict__ m2, int* __restrict__ exponent) {
    const Thread at(1, channel_lanes);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Moments all = merge_blocks(results, blocks, channel, channels, at);
    if (at.lane > 0 || channel >= channels) return;
    if (count && channel == 0) *count = all.count;
    mean[channel] = all.mean;
    rest[channel] = all.rest;
    m2[channel] = all.m2;
    if (exponent) exponent[channel] = all.exponent;
}

__device__ __forceinline__ double variance(const Moments& moments, double correction) {
    const double left = moments.count - correction;
    return left > 0 ? moments.m2 / left : 0;
}

// Return the start moved towards the end, in units of 2**exponent, by a share of the way; all of it where the share is
// 0, whatever the end is.
__device__ __forceinline__ STATISTIC lerp(STATISTIC start, double end, int exponent, double share) {
    return share == 0 ? start : static_cast<STATISTIC>((1 - share) * start + scalbn(share * end, exponent));
}

// A count of batches after one more: at the largest integer it stays.
__device__ Index counted(Index batches) { return batches == 0x7fffffffffffffffLL ? batches : batches + 1; }

// Merge the moments of all blocks, and take the step of the running statistics: what is null is not there. Without a
// momentum (cumulative) they are averages of all batches so far.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_batch(Index channel_lanes, Index blocks, Index channels, const Moments* __restrict__ results,
                double* __restrict__ count, double* __restrict__ mean, double* __restrict__ rest,
                double* __restrict__ var, int* __restrict__ exponent, double correction, double momentum,
                Index cumulative, const Index* __restrict__ batches, Index* __restrict__ new_batches,
                const STATISTIC* __restrict__ running_mean, STATISTIC* __restrict__ new_mean,
                const STATISTIC* __restrict__ running_var, STATISTIC* __restrict__ new_var) {
    const Thread at(1, channel_lanes);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Moments all = merge_blocks(results, blocks, channel, channels, at);
    if (at.lane > 0 || channel >= channels) return;
    mean[channel] = all.mean;
    rest[channel] = all.rest;
    var[channel] = variance(all, 0);
    if (exponent) exponent[channel] = all.exponent;
    if (count && channel == 0) *count = all.count;
    if (batches && channel == 0) *new_batches = counted(*batches);
    if (running_mean) {
        double step = cumulative ? 1 / static_cast<double>(counted(*batches)) : momentum;
        if (WEIGHTED && all.count <= correction) step = 0;
        new_mean[channel] = lerp(running_mean[channel], all.mean + all.rest, all.exponent, step);
        new_var[channel] = lerp(running_var[channel], variance(all, correction), 2 * all.exponent, step);
    }
}
