// Where a thread is, and what it reads and writes.
//
// An array of (N, C) or (N, C, L) is rows x channels x places here, in any memory order. A thread reads a few values at
// once, its *item*: those of CHANNELS neighbouring channels, or of PLACES neighbouring places, as the compiler is told;
// one of them is 1. The threads of a block are place_lanes x channel_lanes x as many as there are: neighbours have
// neighbouring places first, then channels, then rows. Those of one channel share the items of the block: `share` of
// them, from blockIdx.y on. No count of values is too large: indices have 64 bits.
//
// The compiler is also told WEIGHTED: whether values count as often as their weights say.

constexpr int THREADS = 256;       // of a block, at most
constexpr int CHANNEL_LANES = 32;  // at most
constexpr int WIDTH = CHANNELS * PLACES;
constexpr int BYTES = WIDTH * sizeof(VALUE);
// Items that a thread holds at a time: enough to keep memory busy, and few enough for the registers.
constexpr int RUN = WEIGHTED ? (PLACES > 4 ? 2 : 4) : BYTES > 8 || (IS_EXACT && WIDTH > 2) ? 8 : 16;
constexpr int UNROLLED = 4;

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
