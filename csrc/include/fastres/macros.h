// Function qualifiers shared by host and device code.
#pragma once

#if defined(__CUDACC__)
#define FASTRES_HD __host__ __device__ __forceinline__
#else
// Always inlined, not merely `inline`: these headers are compiled once per instruction set, and the
// linker would otherwise be free to keep the AVX-512 copy of a function for a CPU without AVX-512.
#define FASTRES_HD inline __attribute__((always_inline))
#endif
