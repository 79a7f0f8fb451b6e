// How wide this processor's vectors are.

#pragma once

#define INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr long VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr long VECTOR_BYTES = 32;
#else
constexpr long VECTOR_BYTES = 16;
#endif
constexpr long DOUBLES = VECTOR_BYTES / sizeof(double);

}  // namespace
