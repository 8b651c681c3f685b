# Cards that the kernels are built for: CMAKE_CUDA_ARCHITECTURES from SPOT_CUDA_ARCHITECTURES. "80;90a" runs on every card
# from compute capability 8.0 on: machine code for 8.x and for 9.0 (with its warpgroup products), PTX for what is newer.
# "80-virtual", PTX alone, is what bench/run_gpu.sh --portable tests.
set(SPOT_CUDA_ARCHITECTURES "80;90a" CACHE STRING "CUDA architectures of the kernels")
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(word ${SPOT_CUDA_ARCHITECTURES})
  if(NOT word MATCHES "^([0-9]+)[af]?(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "SPOT_CUDA_ARCHITECTURES has \"${word}\": it lists numbers from 80 on, such as 80;90a")
  endif()
  # PTX for one architecture alone serves nobody: its machine code is there.
  if(word MATCHES "a$")
    string(APPEND word -real)
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${word})
endforeach()
