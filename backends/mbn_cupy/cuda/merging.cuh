// Merging of partial results: those of the threads of a block, and then those of all blocks.
//
// A result is a struct with `merge(other)`, and one that is all zeros changes nothing: Moments, or Sums.
//
//     first kernel, a column of a block                     second kernel, of one channel in each column
//
//     lane    0   1   2   3   4   5   6   7                 block    0   1   2   3   ...      blocks x channels
//             |   |   |   |   |   |   |   |                          |   |   |   |
//             +---|---|---|---+   |   |   |   half = 4      lane l merges the blocks l, l + lanes, l + 2 lanes, ...
//             |   +---|---|-------+   |   |                 one after another, UNROLLED of them read at a time;
//             |   |   +---|-----------+   |                 then the lanes merge in the same tree as on the left
//             |   |   |   +---------------+
//             +---|---+   |                   half = 2
//             |   +-------+
//             +---+                           half = 1
//             v
//             results[blockIdx.y * C + channel]     C channels
//
// The bits are the same at every call and on every GPU: there are no atomics, and the order of all additions depends on
// shapes and memory orders alone.

// Merge the results of all lanes into those of lane 0, as a tree. N is the number of channels of a thread. All threads
// of the block have to come here, since they wait for each other. The lanes of the upper half hand theirs over in
// shared memory, which is half x columns x N.
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

// Write the results of a column, which lane 0 has, to `results`, blocks x channels.
template <typename Result>
__device__ void store_result(const Result (&mine)[CHANNELS], const Thread& at, Index channels, Result* results) {
    if (at.lane > 0 || at.channel >= channels) return;
    for (int i = 0; i < CHANNELS; ++i) results[blockIdx.y * channels + at.channel + i] = mine[i];
}

// Merge the results of all blocks for one channel per column, from `results`, blocks x channels. What is returned
// counts in lane 0 of each column alone.
template <typename Result>
__device__ Result merge_blocks(const Result* results, Index blocks, Index channel, Index channels, const Thread& at) {
    Result mine[1] = {};
    if (channel < channels) {
        for (Index block = at.lane; block < blocks; block += UNROLLED * at.lanes) {
            Result found[UNROLLED];
#pragma unroll
            for (int i = 0; i < UNROLLED; ++i) {
                const Index other = block + i * at.lanes;
                found[i] = other < blocks ? results[other * channels + channel] : Result{};  // no change
            }
#pragma unroll
            for (int i = 0; i < UNROLLED; ++i) mine[0].merge(found[i]);
        }
    }
    merge_lanes(mine, at);
    return mine[0];
}
