# CPU kernels, compiled once for each instruction set into a namespace of its own; see csrc/common/cpu_features.h.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64|i[3-6]86)$")
  set(GENFAST_X86 ON)
  # Old compilers and assemblers lack AMX: its namespace is then left out.
  set(genfast_amx_flags -mavx512bf16 -mamx-tile -mamx-bf16)
  include(CheckCXXSourceCompiles)
  list(JOIN genfast_amx_flags " " CMAKE_REQUIRED_FLAGS)
  set(CMAKE_REQUIRED_FLAGS "${CMAKE_REQUIRED_FLAGS} -mavx512f")
  check_cxx_source_compiles(
    "#include <immintrin.h>
    int main() {
      _tile_zero(0);
      _tile_dpbf16ps(0, 1, 2);
      _tile_release();
      return sizeof(_mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(2))) == 64 ? 0 : 1;
    }"
    GENFAST_WITH_AMX)
  unset(CMAKE_REQUIRED_FLAGS)
endif()

function(genfast_cpu_target target)
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
  target_compile_options(${target} PRIVATE -Wall -Wextra -fno-math-errno -fno-trapping-math)
  if(GENFAST_X86)
    target_compile_definitions(${target} PRIVATE GENFAST_X86)
  endif()
  if(GENFAST_WITH_AMX)
    target_compile_definitions(${target} PRIVATE GENFAST_WITH_AMX)
  endif()
  if(GENFAST_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O1)
  endif()
endfunction()

if(NOT GENFAST_SANITIZE AND NOT DEFINED GENFAST_KERNEL_OPTIMIZATION)
  set(GENFAST_KERNEL_OPTIMIZATION -O3)
endif()

# genfast_add_cpu_kernels(<name> <sources...> [PRODUCTS <sources...>]): sets <name>_OBJECTS to the objects of all
# instruction sets; for AMX those of the sources that multiply matrices.
function(genfast_add_cpu_kernels name)
  cmake_parse_arguments(PARSE_ARGV 1 kernels "" "" PRODUCTS)
  set(isas baseline)
  if(GENFAST_X86)
    list(APPEND isas avx2 avx512)
  endif()
  if(GENFAST_WITH_AMX)
    list(APPEND isas amx)
  endif()
  set(flags_baseline -DGENFAST_VEC_PLAIN -Wno-psabi) # vectors wider than registers are passed to inline functions only
  set(flags_avx2 -DGENFAST_VEC_AVX2 -mavx2 -mfma -mf16c)
  set(flags_avx512 -DGENFAST_VEC_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c
                   -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized) # GCC bug 105593
  set(flags_amx ${flags_avx512} -DGENFAST_AMX ${genfast_amx_flags})
  foreach(isa ${isas})
    set(sources ${kernels_PRODUCTS})
    if(NOT isa STREQUAL amx)
      list(APPEND sources ${kernels_UNPARSED_ARGUMENTS})
    endif()
    add_library(${name}_${isa} OBJECT ${sources})
    genfast_cpu_target(${name}_${isa})
    target_compile_definitions(${name}_${isa} PRIVATE GENFAST_ISA=${isa})
    target_compile_options(${name}_${isa} PRIVATE ${GENFAST_KERNEL_OPTIMIZATION} -fno-exceptions -fno-rtti
                                                  -Wno-unused-function ${flags_${isa}})
    if(GENFAST_SANITIZE AND NOT isa STREQUAL baseline) # the same templates; these checks double the time of the build
      target_compile_options(${name}_${isa} PRIVATE -fno-sanitize-address-use-after-scope)
    endif()
    list(APPEND objects $<TARGET_OBJECTS:${name}_${isa}>)
  endforeach()
  set(${name}_OBJECTS ${objects} PARENT_SCOPE)
endfunction()
