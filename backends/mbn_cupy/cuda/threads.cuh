// Where a thread is, and what it reads and writes.
//
// An array of (N, C) or (N, C, L) is rows x channels x positions here, in any memory order. A thread reads a few values at
// once, its *item*: those of CHANNELS neighbouring channels, or of POSITIONS neighbouring positions, as the compiler is told;
// one of them is 1. The threads of a block are position_lanes x channel_lanes x as many as there are: neighbours have
// neighbouring positions first, then channels, then rows. Those of one channel share the items of the block: `share` of
// them, from blockIdx.y on. No count of values is too large: indices have 64 bits.
//
// The compiler is also told WEIGHTED: whether values count as often as their weights say.

constexpr int THREADS = 256;       // of a block, at most
constexpr int CHANNEL_LANES = 32;  // at most
constexpr int WIDTH = CHANNELS * POSITIONS;
constexpr int BYTES = WIDTH * sizeof(VALUE);
// Items that a thread holds at a time: enough to keep memory busy, and few enough for the registers.
constexpr int RUN = WEIGHTED ? (POSITIONS > 4 ? 2 : 4) : BYTES > 8 || (IS_EXACT && WIDTH > 2) ? 8 : 16;
constexpr int UNROLLED = 4;

struct Thread {
    int lane, lanes;      // its position among those with the same channels
    int column, columns;  // and among those with the same rows and positions
    Index channel;        // the first of its own

    __device__ Thread(Index position_lanes, Index channel_lanes) {
        const int number = threadIdx.x, along = static_cast<int>(position_lanes);
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
    Index row, position, row_step, position_step, positions;

    __device__ Walk(const Thread& at, Index rows, Index channels, Index positions, Index share) : positions(positions) {
        const Index packs = positions / POSITIONS, first = blockIdx.y * share + at.lane;
        const Index all = rows * packs, others = (blockIdx.y + 1) * share, end = all < others ? all : others;
        left = at.channel < channels && first < end ? (end - first + at.lanes - 1) / at.lanes : 0;
        row = first / packs;
        position = first % packs * POSITIONS;
        row_step = at.lanes / packs;
        position_step = at.lanes % packs * POSITIONS;
    }

    // Go on, and return whether this takes one row more than the step, since its positions were at their end.
    __device__ __forceinline__ bool advance() {
        --left;
        position += position_step;
        const bool wraps = position >= positions;
        if (wraps) position -= positions;
        return wraps;
    }
};

// What is read and written in one piece. An item itself is taken apart by the compiler, and not always put together
// again.
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
    VALUE values[WIDTH];

    __device__ __forceinline__ auto at(int channel, int position) const { return widen(values[channel * POSITIONS + position]); }
};

// An array, at the item of a walk.
template <typename T>
struct Cursor {
    T* next;
    Index step, wrap, position;  // from an item to the next, what a wrap adds, and from a position to the next

    __device__ Cursor(const Walk& walk, Index first_channel, T* values, Index row, Index channel, Index position)
        : next(values + walk.row * row + first_channel * channel + walk.position * position),
          step(walk.row_step * row + walk.position_step * position),
          wrap(step + row - walk.positions * position),
          position(position) {}

    __device__ __forceinline__ void advance(bool wraps) { next += wraps ? wrap : step; }
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

// The weights of an item's positions: 1 where none are given. They are the same for all channels.
struct Weights {
    STATISTIC values[POSITIONS];

    __device__ __forceinline__ void load(const Counts& weights) {
        if constexpr (WEIGHTED) {
#pragma unroll
            for (int position = 0; position < POSITIONS; ++position) values[position] = weights.next[position * weights.position];
        }
    }
    __device__ __forceinline__ bool counts(int position) const { return !WEIGHTED || values[position] > 0; }
    __device__ __forceinline__ STATISTIC at(int position) const { return WEIGHTED ? values[position] : STATISTIC(1); }
};
