// The dtypes of values, the conversions from them to numbers and back, and powers of two.
//
// Two macros are dtypes: VALUE, that of x, y and their gradients (float16, bfloat16, float32 or float64), and
// STATISTIC, that of weights, parameters and running statistics (float32 or float64). No header is included, so a
// machine needs the compiler alone.
//
//     VALUE --widen--> float or double --arithmetic--> float or double --narrow--> VALUE

using Index = long long;  // of 64 bits, for all extents, strides and offsets
using float32 = float;
using float64 = double;
struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

// Whether values are in float64: then no dtype has the range for their squares, and statistics have exponents.
constexpr bool IS_WIDE = sizeof(VALUE) == sizeof(double);
// Whether statistics need all digits of float64: where values or running statistics are in float64.
constexpr bool IS_EXACT = IS_WIDE || sizeof(STATISTIC) == sizeof(double);

// The dtype in which y is computed before it is rounded to VALUE. Sums are always in float64, and so is dx, which may
// be a small difference of large terms: if dy is proportional to y, for example.
template <typename T>
struct Precision {
    using Output = float;
};
template <>
struct Precision<float64> {
    using Output = double;
};
using Output = typename Precision<VALUE>::Output;

// Powers of two: a number that might leave the range of its dtype has a separate exponent.

// The range of a dtype: numbers are below 2**TOP, subnormal ones at least 2**BOTTOM, and the largest is MOST. Products
// of numbers whose exponents are between -FAR and FAR stay in the range.
template <typename T>
struct Range {
    static constexpr int TOP = 128, BOTTOM = -149, FAR = 100;
    static constexpr double MOST = 3.4028234663852886e38;
};
template <>
struct Range<double> {
    static constexpr int TOP = 1024, BOTTOM = -1074, FAR = 400;  // sums of such squares stay in the range, too
    static constexpr double MOST = 1.7976931348623157e308;
};
constexpr int FARTHEST = 1000;  // the largest exponent whose power of two has an inverse

__device__ __forceinline__ int clamped(int number, int least, int most) {
    return number < least ? least : number > most ? most : number;
}
__device__ __forceinline__ double clamped(double number, double most) {  // NaN stays
    return number < -most ? -most : number > most ? most : number;
}
__device__ __forceinline__ double power(int exponent) { return scalbn(1.0, exponent); }
// Return the exponent of a number, e for 1.5 * 2**e; 0 for 0, infinite numbers and NaN.
__device__ __forceinline__ int exponent_of(double number) {
    const double size = fabs(number);
    return size > 0 && size <= Range<double>::MOST ? ilogb(number) : 0;
}
// Tell whether the square of a deviation, or a sum of such squares, may leave the range of float64.
__device__ __forceinline__ bool is_far(double deviation) {
    const double size = fabs(deviation);
    return !(size == 0 || (size >= 3.8725919148493183e-121 && size <= 2.5822498780869086e120));  // 2**-400 and 2**400
}

// Conversions: `widen` from a value to a number, exactly, and `narrow` back, rounding once to the nearest.

__device__ __forceinline__ double widen(float64 value) { return value; }
__device__ __forceinline__ float widen(float32 value) { return value; }

__device__ __forceinline__ float widen(float16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else  // on the host, where tests execute the kernels
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
    const unsigned half = 0x7fff + (bits >> 16 & 1);  // half of the last kept digit; ties go to even
    value.bits = wide == wide ? (bits + half) >> 16 : 0x7fc0;
}
