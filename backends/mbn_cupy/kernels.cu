// The passes over x of batch normalisation, and what is between them.
//
// The same bits on every run and on every GPU: no atomics, and the order of all additions depends on shapes and memory
// orders alone. No count of values is too large: indices have 64 bits. Nothing is included, so nothing but the compiler
// need be there.
//
// An array of (N, C) or (N, C, L) is rows x channels x places here, in any memory order. A thread reads a few values at
// once, its *item*: those of CHANNELS neighbouring channels, or of PLACES neighbouring places; one of them is 1. The
// threads of a block are place_lanes x channel_lanes x as many as there are: neighbours have neighbouring places first,
// then channels, then rows. Those of one channel share the items of the block: `share` of them, from blockIdx.y on.
//
// The compiler is told VALUE, the dtype of x, y and their gradients; STATISTIC, that of weights, parameters and running
// statistics; CHANNELS; PLACES; and WEIGHTED: whether values count as often as their weights say.

using Index = long long;
using float32 = float;
using float64 = double;
struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

constexpr int THREADS = 256;       // of a block, at most
constexpr int CHANNEL_LANES = 32;  // at most
constexpr int WIDTH = CHANNELS * PLACES;
constexpr int BYTES = WIDTH * sizeof(VALUE);
// Items that a thread holds at a time: enough to keep memory busy, and few enough for the registers.
constexpr int RUN = WEIGHTED ? (PLACES > 4 ? 2 : 4) : BYTES > 8 ? 8 : 16;
constexpr int UNROLLED = 4;

constexpr bool IS_WIDE = sizeof(VALUE) == sizeof(double);

// What results are computed in that are rounded to VALUE next. Sums are always in float64.
template <typename T>
struct Precision {
    using Output = float;
    using Gradient = float;
};
template <>
struct Precision<float32> {
    using Output = float;
    using Gradient = double;  // dx may be all but nothing: where dy is proportional to y, for one
};
template <>
struct Precision<float64> {
    using Output = double;
    using Gradient = double;
};
using Output = typename Precision<VALUE>::Output;
using Gradient = typename Precision<VALUE>::Gradient;

// From values to numbers, and back with one rounding.

__device__ __forceinline__ double widen(float64 value) { return value; }
__device__ __forceinline__ float widen(float32 value) { return value; }

__device__ __forceinline__ float widen(float16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else  // the host of a test
    return __builtin_bit_cast(_Float16, value.bits);
#endif
}

__device__ __forceinline__ float widen(bfloat16 value) {
    const unsigned bits = static_cast<unsigned>(value.bits) << 16;
    return reinterpret_cast<const float&>(bits);
}

__device__ __forceinline__ void narrow(double wide, float64& value) { value = wide; }
__device__ __forceinline__ void narrow(double wide, float32& value) { value = static_cast<float>(wide); }

__device__ __forceinline__ void narrow(float wide, float16& value) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(wide));
#else
    value.bits = __builtin_bit_cast(unsigned short, static_cast<_Float16>(wide));
#endif
}

__device__ __forceinline__ void narrow(float wide, bfloat16& value) {
    const unsigned bits = reinterpret_cast<const unsigned&>(wide);
    const unsigned half = 0x7fff + (bits >> 16 & 1);  // to even, where two are as near
    value.bits = wide == wide ? (bits + half) >> 16 : 0x7fc0;
}

// Where a thread is, and what it reads.

struct Thread {
    int lane, lanes;      // its place among those with the same channels
    int column, columns;  // and among those with the same rows and places
    Index channel;        // the first of its own

    __device__ Thread(Index place_lanes, Index channel_lanes) {
        const int number = threadIdx.x, along = static_cast<int>(place_lanes);
        columns = static_cast<int>(channel_lanes);
        column = number / along % columns;
        lane = number % along + along * (number / (along * columns));
        lanes = blockDim.x / columns;
        channel = (static_cast<Index>(blockIdx.x) * columns + column) * CHANNELS;
    }
};

// The items of a thread, one after another.
struct Walk {
    Index left;  // how many are still to come
    Index row, place, row_step, place_step, places;

    __device__ Walk(const Thread& at, Index rows, Index channels, Index places, Index share) : places(places) {
        const Index packs = places / PLACES, first = blockIdx.y * share + at.lane;
        const Index all = rows * packs, others = (blockIdx.y + 1) * share, end = all < others ? all : others;
        left = at.channel < channels && first < end ? (end - first + at.lanes - 1) / at.lanes : 0;
        row = first / packs;
        place = first % packs * PLACES;
        row_step = at.lanes / packs;
        place_step = at.lanes % packs * PLACES;
    }

    // Go on, and return whether this takes one row more than the step, since its places were at their end.
    __device__ __forceinline__ bool advance() {
        --left;
        place += place_step;
        const bool wraps = place >= places;
        if (wraps) place -= places;
        return wraps;
    }
};

// What is written in one piece. A plain assignment is taken apart by the compiler, and not always put together again.
template <int SIZE>
struct Piece;
template <>
struct Piece<2> {
    using Type = unsigned short;
};
template <>
struct Piece<4> {
    using Type = unsigned;
};
template <>
struct Piece<8> {
    using Type = uint2;
};
template <>
struct Piece<16> {
    using Type = uint4;
};

struct alignas(BYTES) Item {
    VALUE values[WIDTH];

    __device__ __forceinline__ auto at(int channel, int place) const { return widen(values[channel * PLACES + place]); }
};

// An array, at the item of a walk.
template <typename T>
struct Cursor {
    T* next;
    Index step, wrap, place;  // from an item to the next, what a wrap adds, and from a place to the next

    __device__ Cursor(const Walk& walk, Index first_channel, T* values, Index row, Index channel, Index place)
        : next(values + walk.row * row + first_channel * channel + walk.place * place),
          step(walk.row_step * row + walk.place_step * place),
          wrap(step + row - walk.places * place),
          place(place) {}

    __device__ __forceinline__ void advance(bool wraps) { next += wraps ? wrap : step; }
    __device__ __forceinline__ Item load() const { return *reinterpret_cast<const Item*>(next); }
    __device__ __forceinline__ void store(const Item& item) const {
        using Whole = typename Piece<BYTES>::Type;
        __stwb(reinterpret_cast<Whole*>(next), reinterpret_cast<const Whole&>(item));
    }
};
using Values = Cursor<const VALUE>;
using Results = Cursor<VALUE>;
using Counts = Cursor<const STATISTIC>;

// The weights of an item's places: 1 where none are given. They are the same for all channels.
struct Weights {
    STATISTIC values[PLACES];

    __device__ __forceinline__ void load(const Counts& weights) {
        if constexpr (WEIGHTED) {
#pragma unroll
            for (int place = 0; place < PLACES; ++place) values[place] = weights.next[place * weights.place];
        }
    }
    __device__ __forceinline__ bool counts(int place) const { return !WEIGHTED || values[place] > 0; }
    __device__ __forceinline__ STATISTIC at(int place) const { return WEIGHTED ? values[place] : STATISTIC(1); }
};

// Results of blocks, and of threads within a block.

// Count, mean (as mean + rest) and sum of squared deviations of some values.
struct Moments {
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
        const double difference = (other.mean - mean) + (other.rest - rest);
        m2 += other.m2 + difference * difference * (count * share);
        set_mean(mean, rest + difference * share);
        count += other.count;
    }
    __device__ __forceinline__ void merge(const Moments& other) { merge(other, share_of(other.count)); }

    // Set the mean to a sum, and the rest to what rounding takes off it. Of narrower values float64 holds all there is.
    // Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    __device__ __forceinline__ void set_mean(double a, double b) {
        mean = a + b;
        const double b_part = mean - a, a_part = mean - b_part;
        rest = IS_WIDE ? (a - a_part) + (b - b_part) : 0;
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

// Merge the results of all lanes into those of lane 0, as a tree.
template <typename Result, int N>
__device__ void merge_lanes(Result (&mine)[N], const Thread& at) {
    __shared__ Result others[THREADS / 2 * N];
    for (int half = at.lanes / 2; half > 0; half /= 2) {
        if (at.lane >= half && at.lane < 2 * half) {
            for (int i = 0; i < N; ++i) others[((at.lane - half) * at.columns + at.column) * N + i] = mine[i];
        }
        __syncthreads();
        if (at.lane < half) {
            for (int i = 0; i < N; ++i) mine[i].merge(others[(at.lane * at.columns + at.column) * N + i]);
        }
        __syncthreads();
    }
}

template <typename Result>
__device__ void store_result(const Result (&mine)[CHANNELS], const Thread& at, Index channels, Result* results) {
    if (at.lane > 0 || at.channel >= channels) return;
    for (int i = 0; i < CHANNELS; ++i) results[blockIdx.y * channels + at.channel + i] = mine[i];
}

// Merge what all blocks have found of a channel; lane 0 of each column has it.
template <typename Result>
__device__ Result merge_blocks(const Result* results, Index blocks, Index channel, Index channels, const Thread& at) {
    Result mine[1] = {};
    if (channel < channels) {
        for (Index block = at.lane; block < blocks; block += at.lanes) mine[0].merge(results[block * channels + channel]);
    }
    merge_lanes(mine, at);
    return mine[0];
}

// Moments.

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
        double center = 0;  // the first value that counts
#pragma unroll
        for (int i = N * PLACES - 1; i >= 0; --i) {
            if (counts(i)) center = at(channel, i);
        }
        double total, squares;
        sum_around(center, channel, total, squares);
        if constexpr (IS_WIDE) {
            center += total / count;
            sum_around(center, channel, total, squares);
        }
        const double error = total / count;
        Moments result;
        result.count = count;
        result.m2 = squares - total * error;
        result.set_mean(center, error);
        return result;
    }

   private:
    __device__ __forceinline__ void sum_around(double center, int channel, double& total, double& squares) const {
        total = squares = 0;
#pragma unroll
        for (int i = 0; i < N * PLACES; ++i) {
            if (!counts(i)) continue;
            const double deviation = at(channel, i) - center;
            const double once = weights[i / PLACES].at(i % PLACES) * deviation;
            total += once;
            squares += once * deviation;
        }
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
extern "C" __global__ void __launch_bounds__(THREADS)
    merge_moments(Index channel_lanes, Index blocks, Index channels, const Moments* __restrict__ results,
                  double* __restrict__ count, double* __restrict__ mean, double* __restrict__ rest,
                  double* __restrict__ m2) {
    const Thread at(1, channel_lanes);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Moments all = merge_blocks(results, blocks, channel, channels, at);
    if (at.lane > 0 || channel >= channels) return;
    if (count && channel == 0) *count = all.count;
    mean[channel] = all.mean;
    rest[channel] = all.rest;
    m2[channel] = all.m2;
}

__device__ __forceinline__ double variance(const Moments& moments, double correction) {
    const double left = moments.count - correction;
    return left > 0 ? moments.m2 / left : 0;
}

// Return the start moved towards the end by a share of the way; all of it where the share is 0, whatever the end is.
__device__ __forceinline__ STATISTIC lerp(STATISTIC start, double end, double share) {
    return share == 0 ? start : static_cast<STATISTIC>((1 - share) * start + share * end);
}

// Merge the moments of all blocks, and take the step of the running statistics: what is null is not there. Without a
// momentum (cumulative) they are averages of all batches so far.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge_batch(Index channel_lanes, Index blocks, Index channels, const Moments* __restrict__ results,
                double* __restrict__ count, double* __restrict__ mean, double* __restrict__ rest,
                double* __restrict__ var, double correction, double momentum, Index cumulative,
                const Index* __restrict__ batches, Index* __restrict__ new_batches,
                const STATISTIC* __restrict__ running_mean, STATISTIC* __restrict__ new_mean,
                const STATISTIC* __restrict__ running_var, STATISTIC* __restrict__ new_var) {
    const Thread at(1, channel_lanes);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Moments all = merge_blocks(results, blocks, channel, channels, at);
    if (at.lane > 0 || channel >= channels) return;
    mean[channel] = all.mean;
    rest[channel] = all.rest;
    var[channel] = variance(all, 0);
    if (count && channel == 0) *count = all.count;
    if (batches && channel == 0) *new_batches = *batches + 1;
    if (running_mean) {
        double step = cumulative ? 1 / static_cast<double>(*batches + 1) : momentum;
        if (WEIGHTED && all.count <= correction) step = 0;
        new_mean[channel] = lerp(running_mean[channel], all.mean + all.rest, step);
        new_var[channel] = lerp(running_var[channel], variance(all, correction), step);
    }
}

// Normalisation.

// What is known of channels. Mean and variance are those of a batch, or running ones where those are null.
struct Known {
    const double *mean, *rest, *var;
    const STATISTIC *running_mean, *running_var;

    __device__ __forceinline__ double mean_of(Index channel) const {
        return mean ? mean[channel] : static_cast<double>(running_mean[channel]);
    }
    __device__ __forceinline__ double rest_of(Index channel) const { return rest ? rest[channel] : 0; }
    // 1 / sqrt(var + eps), and 0 where that has no value.
    __device__ __forceinline__ double invstd_of(Index channel, double eps) const {
        const double spread = (var ? var[channel] : static_cast<double>(running_var[channel])) + eps;
        return spread == 0 ? 0 : 1 / sqrt(spread);
    }
};

// y = (x - center) * scale + shift. The center is all of the mean that fits its dtype, so x - center is exact where x
// is near the mean; the rest of the mean goes into the shift.
struct Line {
    Output center, scale, shift;
};

// Normalise the next items of a thread.
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
            for (int place = 0; place < PLACES; ++place) {
                const Line& line = lines[channel];
                const Output value = (items[i].at(channel, place) - line.center) * line.scale + line.shift;
                narrow(own[i].counts(place) ? value : 0, result.values[channel * PLACES + place]);
            }
        }
        y.store(result);
        y.advance(wraps[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    normalize(Index place_lanes, Index channel_lanes, Index share, Index rows, Index channels, Index places,
              const VALUE* x, Index x_row, Index x_channel, Index x_place,  // y may be x: nothing is restricted
              VALUE* y, Index y_row, Index y_channel, Index y_place,
              const STATISTIC* weights, Index weights_row, Index weights_place, const double* mean, const double* rest,
              const double* var, const STATISTIC* running_mean, const STATISTIC* running_var, const STATISTIC* weight,
              const STATISTIC* bias, double eps) {
    const Thread at(place_lanes, channel_lanes);
    __shared__ Line lines[CHANNEL_LANES * CHANNELS];
    const Known known = {mean, rest, var, running_mean, running_var};
    for (int i = threadIdx.x; i < at.columns * CHANNELS; i += blockDim.x) {
        const Index channel = static_cast<Index>(blockIdx.x) * at.columns * CHANNELS + i;
        if (channel >= channels) continue;
        double scale = known.invstd_of(channel, eps);
        if (weight) scale *= weight[channel];
        const double hi = known.mean_of(channel), lo = known.rest_of(channel);
        const Output center = static_cast<Output>(hi + lo);
        const double shift = (center - hi - lo) * scale + (bias ? static_cast<double>(bias[channel]) : 0);
        lines[i] = {center, static_cast<Output>(scale), static_cast<Output>(shift)};
    }
    __syncthreads();
    Walk walk(at, rows, channels, places, share);
    if (walk.left == 0) return;
    Line mine[CHANNELS];
    for (int i = 0; i < CHANNELS; ++i) mine[i] = lines[at.column * CHANNELS + i];
    Values from(walk, at.channel, x, x_row, x_channel, x_place);
    Results to(walk, at.channel, y, y_row, y_channel, y_place);
    Counts counts(walk, 0, weights, weights_row, 0, weights_place);
    while (walk.left >= UNROLLED) normalize_items<UNROLLED>(mine, walk, from, to, counts);
    while (walk.left > 0) normalize_items<1>(mine, walk, from, to, counts);
}

// Gradients.

// Add the next items of a thread to the sums of its channels.
template <int N>
__device__ __forceinline__ void add_items(Sums (&mine)[CHANNELS], const double (&centers)[CHANNELS], Walk& walk,
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
            for (int place = 0; place < PLACES; ++place) {
                if (!own[i].counts(place)) continue;
                const double gradient = dys[i].at(channel, place);
                mine[channel].dy += gradient;
                mine[channel].product += gradient * (xs[i].at(channel, place) - centers[channel]);
            }
        }
    }
}

// Write the sums over each block's values of dy and of dy * (x - center): `results` is blocks x channels.
extern "C" __global__ void __launch_bounds__(THREADS)
    grad_sums(Index place_lanes, Index channel_lanes, Index share, Index rows, Index channels, Index places,
              const VALUE* __restrict__ x, Index x_row, Index x_channel, Index x_place,
              const VALUE* __restrict__ dy, Index dy_row, Index dy_channel, Index dy_place,
              const STATISTIC* __restrict__ weights, Index weights_row, Index weights_place,
              const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
              const STATISTIC* __restrict__ running_mean, const STATISTIC* __restrict__ running_var,
              Sums* __restrict__ results) {
    const Thread at(place_lanes, channel_lanes);
    Walk walk(at, rows, channels, places, share);
    Values values(walk, at.channel, x, x_row, x_channel, x_place);
    Values gradients(walk, at.channel, dy, dy_row, dy_channel, dy_place);
    Counts counts(walk, 0, weights, weights_row, 0, weights_place);
    const Known known = {mean, rest, var, running_mean, running_var};
    double centers[CHANNELS] = {};
    if (walk.left > 0) {
        for (int i = 0; i < CHANNELS; ++i) {
            centers[i] = known.mean_of(at.channel + i) + known.rest_of(at.channel + i);
        }
    }
    Sums mine[CHANNELS] = {};
    while (walk.left >= UNROLLED) add_items<UNROLLED>(mine, centers, walk, values, gradients, counts);
    while (walk.left > 0) add_items<1>(mine, centers, walk, values, gradients, counts);
    merge_lanes(mine, at);
    store_result(mine, at, channels, results);
}

// Merge the sums of all blocks into those of dy and of dy * xhat.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge_sums(Index channel_lanes, Index blocks, Index channels, const Sums* __restrict__ results,
               const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
               const STATISTIC* __restrict__ running_mean, const STATISTIC* __restrict__ running_var, double eps,
               double* __restrict__ sum_dy, double* __restrict__ sum_dy_xhat) {
    const Thread at(1, channel_lanes);
    const Index channel = static_cast<Index>(blockIdx.x) * at.columns + at.column;
    const Sums all = merge_blocks(results, blocks, channel, channels, at);
    if (at.lane > 0 || channel >= channels) return;
    const Known known = {mean, rest, var, running_mean, running_var};
    const double hi = known.mean_of(channel), lo = known.rest_of(channel);
    const double left = (hi - (hi + lo)) + lo;  // of the mean
    sum_dy[channel] = all.dy;
    sum_dy_xhat[channel] = (all.product - left * all.dy) * known.invstd_of(channel, eps);
}

// dx = scale * (dy - w * average - w * ((x - center) * slope + left))
struct Back {
    Gradient scale, average, center, slope, left;
};

// Write the gradients of the next items of a thread.
template <int N>
__device__ __forceinline__ void grad_items(const Back (&backs)[CHANNELS], bool is_constant, Walk& walk, Values& x,
                                           Values& dy, Results& dx, Counts& weights) {
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
            for (int place = 0; place < PLACES; ++place) {
                const Back& back = backs[channel];
                Gradient gradient = dys[i].at(channel, place);
                if (!is_constant) {
                    const Gradient w = own[i].at(place);
                    // A large mean of dy goes first: what is left keeps its digits.
                    gradient -= w * back.average;
                    gradient -= w * ((xs[i].at(channel, place) - back.center) * back.slope + back.left);
                }
                narrow(own[i].counts(place) ? gradient * back.scale : 0, result.values[channel * PLACES + place]);
            }
        }
        dx.store(result);
        dx.advance(wraps[i]);
    }
}

// Without sums, mean and variance are constants.
extern "C" __global__ void __launch_bounds__(THREADS)
    grad_input(Index place_lanes, Index channel_lanes, Index share, Index rows, Index channels, Index places,
               const VALUE* __restrict__ x, Index x_row, Index x_channel, Index x_place,
               const VALUE* __restrict__ dy, Index dy_row, Index dy_channel, Index dy_place,
               VALUE* __restrict__ dx, Index dx_row, Index dx_channel, Index dx_place,
               const STATISTIC* __restrict__ weights, Index weights_row, Index weights_place,
               const double* __restrict__ mean, const double* __restrict__ rest, const double* __restrict__ var,
               const STATISTIC* __restrict__ running_mean, const STATISTIC* __restrict__ running_var,
               const STATISTIC* __restrict__ weight, double eps, const double* __restrict__ sum_dy,
               const double* __restrict__ sum_dy_xhat, double count, const double* __restrict__ weighted_count) {
    const Thread at(place_lanes, channel_lanes);
    __shared__ Back backs[CHANNEL_LANES * CHANNELS];
    const Known known = {mean, rest, var, running_mean, running_var};
    for (int i = threadIdx.x; i < at.columns * CHANNELS; i += blockDim.x) {
        const Index channel = static_cast<Index>(blockIdx.x) * at.columns * CHANNELS + i;
        if (channel >= channels) continue;
        const double invstd = known.invstd_of(channel, eps);
        const double scale = weight ? invstd * weight[channel] : invstd;
        double average = 0, slope = 0, left = 0;
        const double hi = known.mean_of(channel), lo = known.rest_of(channel);
        const Gradient center = static_cast<Gradient>(hi + lo);
        if (sum_dy) {
            double n = weighted_count ? *weighted_count : count;
            if (n == 0) n = 1;  // the sums are 0 too
            average = sum_dy[channel] / n;
            slope = sum_dy_xhat[channel] / n * invstd;
            left = ((center - hi) - lo) * slope;
        }
        backs[i] = {static_cast<Gradient>(scale), static_cast<Gradient>(average), center, static_cast<Gradient>(slope),
                    static_cast<Gradient>(left)};
    }
    __syncthreads();
    Walk walk(at, rows, channels, places, share);
    if (walk.left == 0) return;
    Back mine[CHANNELS];
    for (int i = 0; i < CHANNELS; ++i) mine[i] = backs[at.column * CHANNELS + i];
    Values values(walk, at.channel, x, x_row, x_channel, x_place);
    Values gradients(walk, at.channel, dy, dy_row, dy_channel, dy_place);
    Results to(walk, at.channel, dx, dx_row, dx_channel, dx_place);
    Counts counts(walk, 0, weights, weights_row, 0, weights_place);
    while (walk.left >= UNROLLED) grad_items<UNROLLED>(mine, !sum_dy, walk, values, gradients, to, counts);
    while (walk.left > 0) grad_items<1>(mine, !sum_dy, walk, values, gradients, to, counts);
}
