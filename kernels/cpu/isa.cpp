// The instruction sets of this build, and which of them this CPU runs. Compiled for the baseline machine.

#include "isa.h"

namespace bitnet {

namespace {

const char* anywhere() { return nullptr; }

#if defined(__x86_64__)
const char* need_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? nullptr : "this CPU has no AVX2";
}
const char* need_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? nullptr
               : "this CPU has no AVX-512 (F, BW, DQ, VL)";
}
const char* need_vnni() {
    if (need_avx512()) return need_avx512();
    return __builtin_cpu_supports("avx512vnni") ? nullptr : "this CPU has no AVX-512 VNNI";
}
#endif

}  // namespace

const Choice kChoices[] = {
#if defined(__x86_64__)
    {&kAvx512, need_avx512},
    {&kAvx2, need_avx2},
#endif
    {&kScalar, anywhere},
#if defined(__x86_64__)
    {&kVnni, need_vnni},  // last: chosen only by name
#endif
};
const int kChoiceCount = sizeof kChoices / sizeof kChoices[0];

}  // namespace bitnet
