// Function qualifiers shared by host and device code.
#pragma once

#if defined(__CUDACC__)
#define FASTRES_HD __host__ __device__ __forceinline__
#define FASTRES_DEVICE __device__ __forceinline__
#define FASTRES_UNROLLED _Pragma("unroll")
#define FASTRES_UNROLLED_BY_4 _Pragma("unroll 4")
#define FASTRES_NOT_UNROLLED _Pragma("unroll 1")
// Before a template that calls what it is given, on whichever side that is.
#define FASTRES_EITHER_SIDE _Pragma("nv_exec_check_disable")
#else
// Always inlined, not merely `inline`: these headers are compiled once per instruction set, and the
// linker would otherwise be free to keep the AVX-512 copy of a function for a CPU without AVX-512.
#define FASTRES_HD inline __attribute__((always_inline))
// Device code that tests compile for the CPU.
#define FASTRES_DEVICE inline
#define FASTRES_UNROLLED
#define FASTRES_UNROLLED_BY_4
#define FASTRES_NOT_UNROLLED
#define FASTRES_EITHER_SIDE
#endif
