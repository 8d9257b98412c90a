// What is known of channels when their values are normalised, or differentiated.

// Mean and variance are those of a batch, or running ones where those are null.
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
