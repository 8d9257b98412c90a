// What is known of channels when their values are normalised, or differentiated.

// A factor, as number * 2**exponent.
struct Scale {
    double number;
    int exponent;

    __device__ __forceinline__ Scale times(double factor) const {
        const int own = exponent_of(number), other = exponent_of(factor);
        return {scalbn(number, -own) * scalbn(factor, -other), exponent + own + other};
    }
    __device__ __forceinline__ int size() const { return number == 0 ? 0 : exponent + exponent_of(number); }
    // Divided by a power of two. A finite one stays finite: where that changes it, it is the factor of 0, or of what
    // leaves the range of T as well.
    template <typename T>
    __device__ __forceinline__ T over(int other) const {
        const double quotient = scalbn(number, exponent - other);
        return static_cast<T>(fabs(number) <= Range<double>::MOST ? clamped(quotient, Range<T>::MOST) : quotient);
    }
};

// Mean and variance are those of a batch, or running ones where those are null. Those of a batch of float64 are in
// units of 2**exponent and its square.
struct Known {
    const double *mean, *rest, *var;
    const int* exponent;
    const STATISTIC *running_mean, *running_var;

    __device__ __forceinline__ double mean_of(Index channel) const {
        return mean ? mean[channel] : static_cast<double>(running_mean[channel]);
    }
    __device__ __forceinline__ double rest_of(Index channel) const { return rest ? rest[channel] : 0; }
    __device__ __forceinline__ int unit_of(Index channel) const { return exponent ? exponent[channel] : 0; }
    // 1 / sqrt(var + eps), and 0 where that has no value.
    __device__ __forceinline__ Scale invstd_of(Index channel, double eps) const {
        double own = var ? var[channel] : static_cast<double>(running_var[channel]);
        int unit = unit_of(channel);
        if (unit != 0) {  // one in which neither is beyond float64
            const int common = eps > 0 && (own == 0 || exponent_of(eps) / 2 > unit) ? exponent_of(eps) / 2 : unit;
            own = scalbn(own, 2 * (unit - common));
            eps = scalbn(scalbn(eps, -common), -common);
            unit = common;
        }
        const double spread = own + eps;
        return {spread == 0 ? 0 : 1 / sqrt(spread), -unit};
    }
};

// Return the exponent of the power of two by which values, and a center in units, are multiplied before one is taken
// off the other: 0, unless the difference or its product with the scale might leave the range of T. Of float64 it is
// that of the scale, so that no product of a difference with a gradient leaves the range either.
template <typename T>
__device__ __forceinline__ int exponent_before(const Scale& scale, double center, int unit) {
    const int size = scale.size(), far = exponent_of(center) + unit;
    if (!IS_WIDE && unit == 0 && far < Range<T>::FAR && size <= Range<T>::FAR && size >= -Range<T>::FAR) return 0;
    const int room = center == 0 ? Range<T>::TOP : Range<T>::TOP - 8 - far;
    return clamped(size < room ? size : room, Range<T>::BOTTOM, Range<T>::TOP - 1);
}
