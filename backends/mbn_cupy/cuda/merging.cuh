// Merging of partial results: those of the threads of a block, and then those of all blocks.
//
// A result is a struct with `merge(other)`, Moments or Sums; merging one of all zeros changes nothing.
//
//     first kernel, a column of a block                     second kernel, one channel to a column
//
//     thread  0   1   2   3   4   5   6   7                 block    0   1   2   3   ...      blocks x channels
//             |   |   |   |   |   |   |   |                          |   |   |   |
//             +---|---|---|---+   |   |   |   half = 4      thread i of n merges the blocks i, i + n, i + 2n, ...
//             |   +---|---|-------+   |   |                 one after another, UNROLLED of them read at a time;
//             |   |   +---|-----------+   |                 then the threads merge in the same tree as on the left
//             |   |   |   +---------------+
//             +---|---+   |                   half = 2
//             |   +-------+
//             +---+                           half = 1
//             v
//             results[blockIdx.y * C + channel]     C channels
//
// The bits are the same at every call and on every GPU: there are no atomics, and the order of all additions depends on
// shapes and memory orders alone.

// Merge the results of the threads of a column into those of its first thread, as a tree. N is the number of channels
// of a thread. All threads of the block have to call this, since they wait for each other. The threads of the upper
// half pass their results on in shared memory, which is half x columns x N.
template <typename Result, int N>
__device__ void merge_threads(Result (&mine)[N], const Thread& at) {
    __shared__ Result others[THREADS / 2 * N];
    for (int half = at.threads / 2; half > 0; half /= 2) {
        if (at.index >= half && at.index < 2 * half) {
            for (int i = 0; i < N; ++i) others[((at.index - half) * at.columns + at.column) * N + i] = mine[i];
        }
        __syncthreads();
        if (at.index < half) {
            for (int i = 0; i < N; ++i) mine[i].merge(others[(at.index * at.columns + at.column) * N + i]);
        }
        __syncthreads();
    }
}

// Write the results of a column, which its first thread has, to `results`, blocks x channels.
template <typename Result>
__device__ void store_result(const Result (&mine)[CHANNELS], const Thread& at, Index channels, Result* results) {
    if (at.index > 0 || at.channel >= channels) return;
    for (int i = 0; i < CHANNELS; ++i) results[blockIdx.y * channels + at.channel + i] = mine[i];
}

// Merge the results of all blocks for one channel per column, from `results`, blocks x channels. Only the first thread
// of each column returns the merged result.
template <typename Result>
__device__ Result merge_blocks(const Result* results, Index blocks, Index channel, Index channels, const Thread& at) {
    Result mine[1] = {};
    if (channel < channels) {
        for (Index block = at.index; block < blocks; block += UNROLLED * at.threads) {
            Result found[UNROLLED];
#pragma unroll
            for (int i = 0; i < UNROLLED; ++i) {
                const Index other = block + i * at.threads;
                found[i] = other < blocks ? results[other * channels + channel] : Result{};  // no change
            }
#pragma unroll
            for (int i = 0; i < UNROLLED; ++i) mine[0].merge(found[i]);
        }
    }
    merge_threads(mine, at);
    return mine[0];
}
