// The statistics of channels, as arguments of the kernels that normalise and differentiate.
//
// Numbers that may leave the range of float64 have a separate exponent. For values in float64, the mean of a channel is
// (mean + rest) * 2**unit and its variance var * 2**(2 * unit); the unit is nearly always 0.

// A factor, number * 2**exponent.
struct Scale {
    double number;
    int exponent;

    // Return the product with a factor. Both numbers are scaled to near 1 first, so that it stays within the range.
    __device__ __forceinline__ Scale times(double factor) const {
        const int own = exponent_of(number), other = exponent_of(factor);
        return {scalbn(number, -own) * scalbn(factor, -other), exponent + own + other};
    }
    // Return the exponent of number * 2**exponent, 0 where the number is 0.
    __device__ __forceinline__ int size() const { return number == 0 ? 0 : exponent + exponent_of(number); }
    // Return the factor divided by 2**other, in T. A finite factor stays finite, clamped if necessary: its product with
    // 0 must be 0, not NaN, and any other product with so large a factor leaves the range of T anyway.
    template <typename T>
    __device__ __forceinline__ T over(int other) const {
        const double quotient = scalbn(number, exponent - other);
        return static_cast<T>(fabs(number) <= Range<double>::MOST ? clamped(quotient, Range<T>::MOST) : quotient);
    }
};

// Mean and variance of the channels: pointers to contiguous (channels,) vectors. One of `mean` and `running_mean` is
// null, and one of `var` and `running_var`.
//
//     mean, rest     the mean of a batch in two parts; rest is null where there is none
//     var            the biased variance of a batch
//     exponent       the exponents of the units of both; null where the units are 1
//     running_...    running statistics, in their dtype, without rest and unit
struct Stats {
    const double *mean, *rest, *var;
    const int* exponent;
    const STATISTIC *running_mean, *running_var;

    __device__ __forceinline__ double mean_of(Index channel) const {
        return mean ? mean[channel] : static_cast<double>(running_mean[channel]);
    }
    __device__ __forceinline__ double rest_of(Index channel) const { return rest ? rest[channel] : 0; }
    __device__ __forceinline__ int unit_of(Index channel) const { return exponent ? exponent[channel] : 0; }
    // Return 1 / sqrt(var + eps), and 0 where var + eps is 0.
    __device__ __forceinline__ Scale invstd_of(Index channel, double eps) const {
        double own = var ? var[channel] : static_cast<double>(running_var[channel]);
        int unit = unit_of(channel);
        if (unit != 0) {  // in the unit of var, eps may be out of range; in the larger unit of the two neither is
            const int common = eps > 0 && (own == 0 || exponent_of(eps) / 2 > unit) ? exponent_of(eps) / 2 : unit;
            own = scalbn(own, 2 * (unit - common));
            eps = scalbn(scalbn(eps, -common), -common);
            unit = common;
        }
        const double spread = own + eps;
        return {spread == 0 ? 0 : 1 / sqrt(spread), -unit};
    }
};

// Return the exponent of the power of two by which values and their center, center * 2**unit, are multiplied before the
// subtraction. It is 0 unless the difference, or its product with the scale, might leave the range of T. For values in
// float64 it is always about the exponent of the scale, so that products of differences and gradients stay in the range
// too.
template <typename T>
__device__ __forceinline__ int exponent_before(const Scale& scale, double center, int unit) {
    const int size = scale.size(), far = exponent_of(center) + unit;
    if (!IS_WIDE && unit == 0 && far < Range<T>::FAR && size <= Range<T>::FAR && size >= -Range<T>::FAR) return 0;
    const int most = center == 0 ? Range<T>::TOP : Range<T>::TOP - 8 - far;
    return clamped(size < most ? size : most, Range<T>::BOTTOM, Range<T>::TOP - 1);
}
