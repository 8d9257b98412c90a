// The position of a thread in its block, and the items that it reads and writes.
//
// An array of (N, C) or (N, C, L) is rows x channels x positions here, in any memory order. A thread reads a few values
// at once, its *item*: those of CHANNELS neighbouring channels, or of POSITIONS neighbouring positions. The compiler is
// told both, and one of them is 1. A *pack* is the POSITIONS neighbouring positions of an item. In a row there are
// positions / POSITIONS packs, and the items of a channel are numbered row by row:
//
//                 packs of 2 positions
//              p0 p1 | p2 p3 | p4 p5          item i of a channel: row i / 3, pack i % 3
//        r0    item 0| item 1| item 2
//        r1    item 3| item 4| item 5         share = 4: blockIdx.y = 0 takes the items 0 to 3,
//        r2    item 6| item 7| item 8                    blockIdx.y = 1 the items 4 to 7, and so on
//
// The grid is tiles of channels (blockIdx.x) by shares of items (blockIdx.y). The threads of a block are columns by
// lanes. A column is CHANNELS neighbouring channels; there are channel_lanes of them. The threads of a column, its
// lanes, take the items of the block's share in turn, lane 0 the first. Neighbouring threads have neighbouring packs
// first, then channels, then rows, here with position_lanes = 2 and channel_lanes = 2:
//
//        threadIdx.x    0  1  2  3   4  5  6  7
//        column         0  0  1  1   0  0  1  1
//        lane           0  1  0  1   2  3  2  3       lanes = blockDim.x / 2
//
// No number of values is too large: indices have 64 bits. The compiler is also told WEIGHTED: whether each value counts
// as often as its weight says. `launches.py` chooses all of these numbers.
//
// All kernels that go through values have these arguments first:
//
//     position_lanes, channel_lanes, share    as above
//     rows, channels, positions               the extents of the batch
//     x, x_row, x_channel, x_position         an array, never null, and its strides in values; y, dy and dx alike
//     weights, weights_row, weights_position  the weights of rows x positions, and their strides in values; null
//                                             unless WEIGHTED, and then all channels have the same ones

constexpr int THREADS = 256;       // of a block, at most
constexpr int CHANNEL_LANES = 32;  // at most
constexpr int WIDTH = CHANNELS * POSITIONS;     // values of an item
constexpr int BYTES = WIDTH * sizeof(VALUE);    // 2, 4, 8 or 16
// Items that a thread holds at a time, RUN where it takes moments and UNROLLED elsewhere: enough loads to keep memory
// busy, and few enough for the registers.
constexpr int RUN = WEIGHTED ? (POSITIONS > 4 ? 2 : 4) : BYTES > 8 || (IS_EXACT && WIDTH > 2) ? 8 : 16;
constexpr int UNROLLED = 4;

struct Thread {
    int lane, lanes;      // number among the threads of its column, and how many these are: a power of two
    int column, columns;  // number of its column, and how many columns the block has
    Index channel;        // the first of its channels, which may be beyond the last of the array

    __device__ Thread(Index position_lanes, Index channel_lanes) {
        const int number = threadIdx.x, along = static_cast<int>(position_lanes);
        columns = static_cast<int>(channel_lanes);
        column = number / along % columns;
        lane = number % along + along * (number / (along * columns));
        lanes = blockDim.x / columns;
        channel = (static_cast<Index>(blockIdx.x) * columns + column) * CHANNELS;
    }
};

// The items of a thread, one after another. From one item to the next a thread goes `lanes` items on: some rows and
// some positions. If that takes it beyond the last position, it wraps: one row more, and as many positions less.
struct Walk {
    Index left;                   // how many are still to come
    Index row, position,          // of the first item; later the position alone is kept up to date
        row_step, position_step,  // from an item to the next
        positions;                // of a row

    __device__ Walk(const Thread& at, Index rows, Index channels, Index positions, Index share) : positions(positions) {
        const Index packs = positions / POSITIONS, first = blockIdx.y * share + at.lane;
        const Index all = rows * packs, others = (blockIdx.y + 1) * share, end = all < others ? all : others;
        left = at.channel < channels && first < end ? (end - first + at.lanes - 1) / at.lanes : 0;
        row = first / packs;
        position = first % packs * POSITIONS;
        row_step = at.lanes / packs;
        position_step = at.lanes % packs * POSITIONS;
    }

    // Go to the next item, and return whether that wraps.
    __device__ __forceinline__ bool advance() {
        --left;
        position += position_step;
        const bool wraps = position >= positions;
        if (wraps) position -= positions;
        return wraps;
    }
};

// The type in which an item of so many bytes is read and written. The compiler takes the array of an item apart into
// values, and does not always put them together to one access again.
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

using Whole = typename Piece<BYTES>::Type;

struct alignas(BYTES) Item {
    VALUE values[WIDTH];  // CHANNELS x POSITIONS

    // Return a value as a number: float, or double where IS_WIDE. Channel and position are within the item.
    __device__ __forceinline__ auto at(int channel, int position) const {
        return widen(values[channel * POSITIONS + position]);
    }
};

// An array, at the current item of a walk.
template <typename T>
struct Cursor {
    T* next;       // the first value of the current item
    Index step,    // from an item to the next, in values, without a wrap
        wrap,      // the same with a wrap
        position;  // from a position to the next

    __device__ Cursor(const Walk& walk, Index first_channel, T* values, Index row, Index channel, Index position)
        : next(values + walk.row * row + first_channel * channel + walk.position * position),
          step(walk.row_step * row + walk.position_step * position),
          wrap(step + row - walk.positions * position),
          position(position) {}

    __device__ __forceinline__ void advance(bool wraps) { next += wraps ? wrap : step; }
    // Read an item through the caches, and write one.
    __device__ __forceinline__ Item load() const {
        const Whole whole = __ldca(reinterpret_cast<const Whole*>(next));
        return reinterpret_cast<const Item&>(whole);
    }
    __device__ __forceinline__ void store(const Item& item) const {
        __stwb(reinterpret_cast<Whole*>(next), reinterpret_cast<const Whole&>(item));
    }
};
using Values = Cursor<const VALUE>;
using Results = Cursor<VALUE>;
using Counts = Cursor<const STATISTIC>;

// The weights of an item's positions: 1 unless WEIGHTED. They are the same for all channels.
struct Weights {
    STATISTIC values[POSITIONS];

    __device__ __forceinline__ void load(const Counts& weights) {
        if constexpr (WEIGHTED) {
#pragma unroll
            for (int position = 0; position < POSITIONS; ++position)
                values[position] = weights.next[position * weights.position];
        }
    }
    __device__ __forceinline__ bool counts(int position) const { return !WEIGHTED || values[position] > 0; }
    __device__ __forceinline__ STATISTIC at(int position) const { return WEIGHTED ? values[position] : STATISTIC(1); }
};
