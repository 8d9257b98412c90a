// Count, mean and m2 of channels, and the step of the running statistics: one pass over x, and a kernel that merges.
//
//     `moments`: a thread            reads CHUNK items at a time, computes the moments of each channel in them, and
//                                    merges these into the moments of its channels, one chunk after another
//                a block             merges those of the threads of each column in a tree (merging.cuh)
//                    |
//                    v
//                results             blocks x channels, a struct Moments each
//                    |
//                    v
//     `merge_moments`, `merge_batch` merge those of all blocks, and write vectors of channels
//
// There are three kinds of statistics:
//
//     values          running statistics    mean        m2, and sums of deviations
//     <= float32      float32               hi + lo     one float64, from deviations from one of the values
//     <= float32      float64 (IS_EXACT)    hi + lo     hi + lo, from deviations from the mean of a chunk
//     float64         (IS_EXACT, IS_WIDE)   hi + lo     hi + lo, the same, in units of 2**exponent

// The least number of blocks on a multiprocessor at the same time, which bounds the registers of a thread: one where a
// thread keeps exact statistics of up to four channels.
constexpr int BLOCKS = IS_EXACT && !IS_WIDE ? 1 : 2;

// A sum, hi. An exact one has the sum of the rounding errors of hi in lo.
template <bool>
struct Sum {
    double hi;
    static constexpr double lo = 0;

    __device__ __forceinline__ double total() const { return hi; }
    __device__ __forceinline__ double rest() const { return 0; }
    __device__ __forceinline__ void add(double value) { hi += value; }
    __device__ __forceinline__ void add(double value, double) { add(value); }
    __device__ __forceinline__ void scale(int exponent) { hi = scalbn(hi, exponent); }
};
template <>
struct Sum<true> {
    double hi, lo;

    // The sum rounded to float64, and the rest of it.
    __device__ __forceinline__ double total() const { return hi + lo; }
    __device__ __forceinline__ double rest() const { return (hi - total()) + lo; }
    // The rounding error of hi + value is computed exactly, whichever of the two is larger.
    // Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    __device__ __forceinline__ void add(double value) {
        const double sum = hi + value, part = sum - hi;
        lo += (hi - (sum - part)) + (value - part);
        hi = sum;
    }
    __device__ __forceinline__ void add(double value, double rest) {
        add(value);
        lo += rest;
    }
    __device__ __forceinline__ void scale(int exponent) {
        hi = scalbn(hi, exponent);
        lo = scalbn(lo, exponent);
    }
};
using Statistic = Sum<IS_EXACT>;

// The exponent of the unit of the mean, whose square is the unit of m2; a constant 0 unless values are in float64.
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

// The share of `more` values in a total of count + more, hi + lo: lo is the rounding error of hi.
struct Share {
    double hi, lo;

    __device__ Share(double more, double count)
        : hi(more / (count + more)), lo(IS_EXACT ? fma(-hi, count + more, more) / (count + more) : 0) {}
};

// Count, mean and sum of squared deviations of some values of a channel. In memory it is 4, 5 or 6 float64, of which
// `kernels.py` allocates blocks x channels; all zeros are the moments of no values.
struct Moments : Unit<IS_WIDE> {
    double count;    // the sum of the weights
    Sum<true> mean;  // with a rest for every dtype, since gradients need all digits of x - mean
    Statistic m2;

    // Merge the moments of other values, whose share of all values is given.
    // Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
    // equations 2.1.
    __device__ __forceinline__ void merge(const Moments& other, const Share& share) {
        if (other.count == 0) return;
        if (count == 0) {
            *this = other;
            return;
        }
        if constexpr (IS_WIDE) {
            if (exponent != other.exponent) {
                // Convert both to the larger unit; if the values of one are all 0, to the unit of the other.
                Moments theirs = other;
                const bool is_larger = theirs.is_zero() || (!is_zero() && exponent > theirs.exponent);
                const int common = is_larger ? exponent : theirs.exponent;
                theirs.set_exponent(common);
                set_exponent(common);
                add(theirs, share);
                return;
            }
        }
        add(other, share);
    }
    __device__ __forceinline__ void merge(const Moments& other) { merge(other, Share(other.count, count)); }

    // Merge moments in the same unit, with d = other.mean - mean and s = share: m2 grows by other.m2 + d * d * count *
    // s, and the mean by d * s. That product is split into a rounded number, `change`, and its rounding error.
    __device__ __forceinline__ void add(const Moments& other, const Share& share) {
        Sum<true> difference = other.mean;
        difference.add(-mean.hi, -mean.lo);
        const double far = difference.total(), change = __dmul_rn(far, share.hi);  // not fused, for the fma below
        m2.add(other.m2.hi, other.m2.lo);
        m2.add(far * far * (count * share.hi));
        mean.add(change, fma(far, share.hi, -change) + (far * share.lo + difference.rest() * share.hi));
        count += other.count;
    }

    __device__ bool is_zero() const { return mean.hi == 0 && m2.hi == 0; }
    // Convert to another unit: scale the mean by the quotient of the units, and m2 by its square.
    __device__ void set_exponent(int next) {
        mean.scale(exponent - next);
        m2.scale(2 * (exponent - next));
        set(next);
    }
};

// The next N items of a thread, all in registers, with the weights of their positions. The index i counts the N *
// POSITIONS values of a channel.
template <int N>
struct Chunk {
    Item items[N];
    Weights weights[N];

    // Return the sum of the weights, which is the same for all channels.
    __device__ __forceinline__ double count() const {
        double total = 0;
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int position = 0; position < POSITIONS; ++position) total += weights[i].at(position);
        return total;
    }

    // Return the moments of the values of one channel. `count`, the sum of their weights, is above 0.
    __device__ __forceinline__ Moments moments(int channel, double count) {
        Moments result = {};
        result.count = count;
        if constexpr (!IS_EXACT) {
            // From deviations from the first value with a weight, which the loop finds backwards. If it is an outlier,
            // the sums lose no more digits than float64 has beyond float32.
            // Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, equation 1.7.
            double center = 0, total = 0, squares = 0;
#pragma unroll
            for (int i = N * POSITIONS - 1; i >= 0; --i) {
                if (counts(i)) center = at(channel, i);
            }
#pragma unroll
            for (int i = 0; i < N * POSITIONS; ++i) {
                if (!counts(i)) continue;
                const double deviation = at(channel, i) - center, once = weight(i) * deviation;
                total += once;
                squares += once * deviation;
            }
            result.mean.hi = center;
            result.mean.add(total / count);
            result.m2.hi = squares - total * (total / count);
        } else {
            // Exactly, in two passes over the registers: the mean, with a rest, and then squares of deviations from it.
            if constexpr (IS_WIDE) result.set(to_unit(channel));
            Sum<true> total = {}, squares = {}, origin = {};
            // With weights, the count and the quotient by it are rounded. With one of the values as the origin, this
            // loses digits of deviations, which are small, and not of values.
            if constexpr (WEIGHTED) {
#pragma unroll
                for (int i = N * POSITIONS - 1; i >= 0; --i) {
                    if (counts(i)) origin.hi = at(channel, i);
                }
            }
#pragma unroll
            for (int i = 0; i < N * POSITIONS; ++i) {
                if (!counts(i)) continue;
                Sum<true> value = {at(channel, i), 0};
                value.add(-origin.hi);
                // The product of weight and value, and its rounding error. The product must not become part of an FMA.
                const double once = __dmul_rn(weight(i), value.hi);
                total.add(once, WEIGHTED ? fma(weight(i), value.hi, -once) + weight(i) * value.lo : 0);
            }
            // The mean: a rounded quotient, and the remainder of the division divided in turn.
            const double average = total.hi / count;
            origin.add(average, (fma(-average, count, total.hi) + total.lo) / count);
            // The deviations are from the rounded mean, center. The sum of squares around the mean itself, center +
            // rest, is less by count * rest * rest.
            const double center = origin.hi, rest = origin.lo;
#pragma unroll
            for (int i = 0; i < N * POSITIONS; ++i) {
                if (!counts(i)) continue;
                const double deviation = at(channel, i) - center;
                squares.add(weight(i) * deviation * deviation);
            }
            result.mean.add(center, rest);
            result.m2.add(squares.hi, squares.lo - count * rest * rest);
        }
        return result;
    }

   private:
    // Return the exponent of a unit in which the squares of a channel's values stay within float64, nearly always 0,
    // and divide the values by it.
    __device__ __forceinline__ int to_unit(int channel) {
        double largest = 0;
#pragma unroll
        for (int i = 0; i < N * POSITIONS; ++i) {
            if (counts(i)) largest = fmax(largest, fabs(at(channel, i)));
        }
        if (!is_far(largest)) return 0;
        const int exponent = clamped(exponent_of(largest), -FARTHEST, FARTHEST);
#pragma unroll
        for (int i = 0; i < N * POSITIONS; ++i)
            items[i / POSITIONS].values[channel * POSITIONS + i % POSITIONS] *= power(-exponent);
        return exponent;
    }

    __device__ __forceinline__ bool counts(int i) const { return weights[i / POSITIONS].counts(i % POSITIONS); }
    __device__ __forceinline__ double at(int channel, int i) const {
        return items[i / POSITIONS].at(channel, i % POSITIONS);
    }
    __device__ __forceinline__ double weight(int i) const { return weights[i / POSITIONS].at(i % POSITIONS); }
};

// Read the next N items of a thread, and merge their moments into those of its channels, `mine`.
template <int N>
__device__ __forceinline__ void absorb(Moments (&mine)[CHANNELS], Walk& walk, Values& x, Counts& weights) {
    Chunk<N> chunk;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        chunk.items[i] = x.load();
        chunk.weights[i].load(weights);
        const bool wraps = walk.advance();
        x.advance(wraps);
        weights.advance(wraps);
    }
    const double count = chunk.count();
    if (count == 0) return;
    const Share share(count, mine[0].count);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
        mine[i].merge(chunk.moments(i, count), share);
        mine[i].count = mine[0].count;  // no change; it lets the compiler keep one count for all channels
    }
}

// Write the moments of each block's values.
//
//     position_threads to weights_position  see threads.cuh
//     results                               blocks (blockIdx.y) x channels, written
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    moments(Index position_threads, Index channel_threads, Index share, Index rows, Index channels, Index positions,
            const VALUE* __restrict__ x, Index x_row, Index x_channel, Index x_position,
            const STATISTIC* __restrict__ weights, Index weights_row, Index weights_position,
            Moments* __restrict__ results) {
    const Thread at(position_threads, channel_threads);
    Walk walk(at, rows, channels, positions, share);
    Values values(walk, at.channel, x, x_row, x_channel, x_position);
    Counts counts(walk, 0, weights, weights_row, 0, weights_position);
    // Accumulate: CHUNK items at a time, and the remaining items one by one.
    Moments mine[CHANNELS] = {};
    while (walk.left >= CHUNK) absorb<CHUNK>(mine, walk, values, counts);
    while (walk.left > 0) absorb<1>(mine, walk, values, counts);
    // Reduce over the threads of each column, and store.
    merge_threads(mine, at);
    store_result(mine, at, channels, results);
}

// Merge the moments of all blocks.
//
//     channel_threads          channels of a block: its columns
//     blocks, channels         the extents of results
//     results                  blocks x channels, as `moments` writes them
//     count                    one number, written: the sum of the weights; null where there are none
//     mean, rest, m2           (channels,), written: the mean in two parts, and m2
//     exponent                 (channels,), written: the exponents of their units; null unless values are in float64
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_moments(Index channel_threads, Index blocks, Index channels, const Moments* __restrict__ results,
                  double* __restrict__ count, double* __restrict__ mean, double* __restrict__ rest,
                  double* __restrict__ m2, int* __restrict__ exponent) {
    const Thread at(1, channel_threads);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Moments all = merge_blocks(results, blocks, channel, channels, at);
    if (at.index > 0 || channel >= channels) return;
    if (count && channel == 0) *count = all.count;
    mean[channel] = all.mean.total();
    rest[channel] = all.mean.rest();
    m2[channel] = all.m2.total();
    if (exponent) exponent[channel] = all.exponent;
}

// Return m2 / (count - correction), and 0 where the weights add up to no more than the correction.
__device__ __forceinline__ double variance(const Moments& moments, double correction) {
    const double left = moments.count - correction;
    return left > 0 ? moments.m2.total() / left : 0;
}

// Return (1 - share) * start + share * end * 2**exponent; if the share is 0, the start, even if the end is NaN.
__device__ __forceinline__ STATISTIC lerp(STATISTIC start, double end, int exponent, double share) {
    return share == 0 ? start : static_cast<STATISTIC>((1 - share) * start + scalbn(share * end, exponent));
}

// Return the number of batches plus 1, at most the largest integer.
__device__ Index counted(Index batches) { return batches == 0x7fffffffffffffffLL ? batches : batches + 1; }

// Merge the moments of all blocks, and take the step of the running statistics.
//
//     channel_threads to rest        as for `merge_moments`
//     var                            (channels,), written: the biased variance, in the square of the unit
//     exponent                       as for `merge_moments`
//     correction                     subtracted from the count for the running variance
//     momentum, cumulative           the share of the batch; if cumulative is not 0, 1 / the number of batches instead
//     batches, new_batches           one integer each, the number of batches before and after (written); may be null
//     running_mean, running_var      (channels,), read; null without running statistics
//     new_mean, new_var              (channels,), written; null without running statistics
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_batch(Index channel_threads, Index blocks, Index channels, const Moments* __restrict__ results,
                double* __restrict__ count, double* __restrict__ mean, double* __restrict__ rest,
                double* __restrict__ var, int* __restrict__ exponent, double correction, double momentum,
                Index cumulative, const Index* __restrict__ batches, Index* __restrict__ new_batches,
                const STATISTIC* __restrict__ running_mean, STATISTIC* __restrict__ new_mean,
                const STATISTIC* __restrict__ running_var, STATISTIC* __restrict__ new_var) {
    const Thread at(1, channel_threads);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Moments all = merge_blocks(results, blocks, channel, channels, at);
    if (at.index > 0 || channel >= channels) return;
    mean[channel] = all.mean.total();
    rest[channel] = all.mean.rest();
    var[channel] = variance(all, 0);
    if (exponent) exponent[channel] = all.exponent;
    if (count && channel == 0) *count = all.count;
    if (batches && channel == 0) *new_batches = counted(*batches);
    if (running_mean) {
        double step = cumulative ? 1 / static_cast<double>(counted(*batches)) : momentum;
        if (WEIGHTED && all.count <= correction) step = 0;
        new_mean[channel] = lerp(running_mean[channel], all.mean.total(), all.exponent, step);
        new_var[channel] = lerp(running_var[channel], variance(all, correction), 2 * all.exponent, step);
    }
}
