// From what threads have found to what a block has, and on to what all have.
//
// The same bits on every run and on every GPU: no atomics, and the order of all additions depends on shapes and memory
// orders alone.

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
        for (Index block = at.lane; block < blocks; block += UNROLLED * at.lanes) {
            Result found[UNROLLED];
#pragma unroll
            for (int i = 0; i < UNROLLED; ++i) {
                const Index other = block + i * at.lanes;
                found[i] = other < blocks ? results[other * channels + channel] : Result{};  // which changes nothing
            }
#pragma unroll
            for (int i = 0; i < UNROLLED; ++i) mine[0].merge(found[i]);
        }
    }
    merge_lanes(mine, at);
    return mine[0];
}
