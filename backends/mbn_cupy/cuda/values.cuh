// The dtypes of values, and the way from them to numbers and back.
//
// The compiler is told VALUE, the dtype of x, y and their gradients, and STATISTIC, that of weights, parameters and running
// statistics. Nothing is included, so nothing but the compiler need be there.

using Index = long long;
using float32 = float;
using float64 = double;
struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

constexpr bool IS_WIDE = sizeof(VALUE) == sizeof(double);
// Statistics in float64 of float64, or of what a layer in float64 has to know as well.
constexpr bool IS_EXACT = IS_WIDE || sizeof(STATISTIC) == sizeof(double);

// What y is computed in, which is rounded to VALUE next. Sums are always in float64, and so is dx, which may be all but
// nothing: where dy is proportional to y, for one.
template <typename T>
struct Precision {
    using Output = float;
};
template <>
struct Precision<float64> {
    using Output = double;
};
using Output = typename Precision<VALUE>::Output;

// Powers of two. Numbers have them beside them where they might leave the range of their dtype.

template <typename T>
struct Range {
    static constexpr int TOP = 128, BOTTOM = -149, FAR = 100;
    static constexpr double MOST = 3.4028234663852886e38;
};
template <>
struct Range<double> {
    static constexpr int TOP = 1024, BOTTOM = -1074, FAR = 400;  // squares of what is not FAR are well within
    static constexpr double MOST = 1.7976931348623157e308;
};
constexpr int FARTHEST = 1000;  // of an exponent whose power of two has an inverse

__device__ __forceinline__ int clamped(int number, int least, int most) {
    return number < least ? least : number > most ? most : number;
}
__device__ __forceinline__ double clamped(double number, double most) {  // NaN stays
    return number < -most ? -most : number > most ? most : number;
}
__device__ __forceinline__ double power(int exponent) { return scalbn(1.0, exponent); }
// The exponent of a number, and 0 of those that have none.
__device__ __forceinline__ int exponent_of(double number) {
    const double size = fabs(number);
    return size > 0 && size <= Range<double>::MOST ? ilogb(number) : 0;
}
// Whether squares of a deviation may leave the range of float64.
__device__ __forceinline__ bool is_far(double deviation) {
    const double size = fabs(deviation);
    return !(size == 0 || (size >= 3.8725919148493183e-121 && size <= 2.5822498780869086e120));  // 2**-400 and 2**400
}

// From values to numbers, and back with one rounding.

__device__ __forceinline__ double widen(float64 value) { return value; }
__device__ __forceinline__ float widen(float32 value) { return value; }

__device__ __forceinline__ float widen(float16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else  // the host of a test
    return __builtin_bit_cast(_Float16, value.bits);
#endif
}

__device__ __forceinline__ float widen(bfloat16 value) {
    const unsigned bits = static_cast<unsigned>(value.bits) << 16;
    return reinterpret_cast<const float&>(bits);
}

__device__ __forceinline__ void narrow(double wide, float64& value) { value = wide; }
__device__ __forceinline__ void narrow(double wide, float32& value) { value = static_cast<float>(wide); }

__device__ __forceinline__ void narrow(float wide, float16& value) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(wide));
#else
    value.bits = __builtin_bit_cast(unsigned short, static_cast<_Float16>(wide));
#endif
}

__device__ __forceinline__ void narrow(float wide, bfloat16& value) {
    const unsigned bits = reinterpret_cast<const unsigned&>(wide);
    const unsigned half = 0x7fff + (bits >> 16 & 1);  // to even, where two are as near
    value.bits = wide == wide ? (bits + half) >> 16 : 0x7fc0;
}
