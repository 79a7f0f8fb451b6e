// Half precision to float and back, many numbers at a time.

#include "../../../lightning_gap/ghost/kernels/samples.h"

#define BOTH(type)                                                                                         \
    extern "C" void widen_##type(const type* from, float* to, long count) {                                \
        for (long i = 0; i < count; i += LANES<float>) store(to + i, load(from + i));                      \
    }                                                                                                      \
    extern "C" void narrow_##type(const float* from, type* to, long count) {                               \
        for (long i = 0; i < count; i += LANES<float>) store(to + i, load(from + i));                      \
    }
BOTH(bfloat16)
BOTH(float16)
