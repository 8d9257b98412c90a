// The index of a thread in its block, and the items that it reads and writes.
//
// An array of (N, C) or (N, C, L) is rows x channels x positions here, in any memory order. A thread reads a few values
// at once, an *item*: those of CHANNELS neighbouring channels, or of POSITIONS neighbouring positions. Both are macros,
// and one of them is 1. A *pack* is the POSITIONS neighbouring positions of an item. A row has positions / POSITIONS
// packs, and the items of a channel are numbered row by row:
//
//                 packs of 2 positions
//              p0 p1 | p2 p3 | p4 p5          item i of a channel: row i / 3, pack i % 3
//        r0    item 0| item 1| item 2
//        r1    item 3| item 4| item 5         share = 4: blockIdx.y = 0 takes the items 0 to 3,
//        r2    item 6| item 7| item 8                    blockIdx.y = 1 the items 4 to 7, and so on
//
// The grid is tiles of channels (blockIdx.x) by shares of items (blockIdx.y). The threads of a block are divided into
// channel_threads columns. A column processes CHANNELS neighbouring channels. The threads of a column, numbered by
// index, take the items of the block's share in turn, index 0 the first. Neighbouring threads have neighbouring packs
// first, then channels, then rows; for position_threads = 2 and channel_threads = 2:
//
//        threadIdx.x    0  1  2  3   4  5  6  7
//        column         0  0  1  1   0  0  1  1
//        index          0  1  0  1   2  3  2  3       threads of a column = blockDim.x / 2
//
// No number of values is too large: indices have 64 bits. The macro WEIGHTED tells whether values have weights.
// `launches.py` chooses all of these numbers.
//
// All kernels that pass over x begin with these arguments:
//
//     position_threads, channel_threads, share  as above
//     rows, channels, positions                 the extents of the batch
//     x, x_row, x_channel, x_position           an array, never null, and its strides in values; y, dy and dx alike
//     weights, weights_row, weights_position    the weights, rows x positions, the same for all channels, and their
//                                               strides in values; null unless WEIGHTED

constexpr int THREADS = 256;                  // of a block, at most
constexpr int CHANNEL_THREADS = 32;           // at most
constexpr int WIDTH = CHANNELS * POSITIONS;   // values of an item
constexpr int BYTES = WIDTH * sizeof(VALUE);  // 2, 4, 8 or 16
// Items that a thread holds at a time, CHUNK for moments and UNROLLED elsewhere: enough loads to keep memory busy, and
// few enough for the registers.
constexpr int CHUNK = WEIGHTED ? (POSITIONS > 4 ? 2 : 4) : BYTES > 8 || (IS_EXACT && WIDTH > 2) ? 8 : 16;
constexpr int UNROLLED = 4;

struct Thread {
    int index, threads;   // the index within the column, and the number of threads of a column, a power of two
    int column, columns;  // the index of the column, and the number of columns of the block
    Index channel;        // the first channel of the column, which may be beyond the last of the array

    __device__ Thread(Index position_threads, Index channel_threads) {
        const int number = threadIdx.x, along = static_cast<int>(position_threads);
        columns = static_cast<int>(channel_threads);
        column = number / along % columns;
        index = number % along + along * (number / (along * columns));
        threads = blockDim.x / columns;
        channel = (static_cast<Index>(blockIdx.x) * columns + column) * CHANNELS;
    }
};

// The items of a thread, one after another. The next item of a thread is `threads` items further: some rows and some
// positions. If that is beyond the last position of the row, it wraps to the next row.
struct Walk {
    Index left;                   // the number of items that are left
    Index row, position,          // of the first item; later only the position is kept up to date
        row_step, position_step,  // from an item to the next
        positions;                // of a row

    __device__ Walk(const Thread& at, Index rows, Index channels, Index positions, Index share) : positions(positions) {
        const Index packs = positions / POSITIONS, first = blockIdx.y * share + at.index;
        const Index all = rows * packs, others = (blockIdx.y + 1) * share, end = all < others ? all : others;
        left = at.channel < channels && first < end ? (end - first + at.threads - 1) / at.threads : 0;
        row = first / packs;
        position = first % packs * POSITIONS;
        row_step = at.threads / packs;
        position_step = at.threads % packs * POSITIONS;
    }

    // Advance to the next item, and return whether that wraps.
    __device__ __forceinline__ bool advance() {
        --left;
        position += position_step;
        const bool wraps = position >= positions;
        if (wraps) position -= positions;
        return wraps;
    }
};

// The type in which an item of SIZE bytes is read and written in one access. Without it the compiler accesses the
// values of an item one by one, and does not always combine them.
template <int SIZE>
struct WordOf;
template <>
struct WordOf<2> {
    using Type = unsigned short;
};
template <>
struct WordOf<4> {
    using Type = unsigned;
};
template <>
struct WordOf<8> {
    using Type = uint2;
};
template <>
struct WordOf<16> {
    using Type = uint4;
};

using Word = typename WordOf<BYTES>::Type;

struct alignas(BYTES) Item {
    VALUE values[WIDTH];  // CHANNELS x POSITIONS

    // Return a value as a number: float, or double where IS_WIDE. Channel and position are indices within the item.
    __device__ __forceinline__ auto at(int channel, int position) const {
        return widen(values[channel * POSITIONS + position]);
    }
};

// A pointer into an array, at the current item of a walk.
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
    // Read an item through all caches, or write one.
    __device__ __forceinline__ Item load() const {
        const Word word = __ldca(reinterpret_cast<const Word*>(next));
        return reinterpret_cast<const Item&>(word);
    }
    __device__ __forceinline__ void store(const Item& item) const {
        __stwb(reinterpret_cast<Word*>(next), reinterpret_cast<const Word&>(item));
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
