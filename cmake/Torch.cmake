# Imports the libtorch that lies inside the installed `torch` Python package as the target torch::torch.
# TorchConfig.cmake is not used: with a CUDA build of torch it demands a whole CUDA toolkit configuration
# even from targets that hold no device code.
# A build frontend runs this in an environment of its own, by way of PYTHONPATH, which hides the installed torch.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH ${Python3_EXECUTABLE} -c
          "import torch,os;print(os.path.dirname(torch.__file__));print(torch.__version__);print(torch.version.cuda or '')"
  OUTPUT_VARIABLE torch_facts
  RESULT_VARIABLE torch_missing
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(torch_missing)
  if(SPOT_WHEEL)
    message(FATAL_ERROR "${Python3_EXECUTABLE} has no torch package, against which this is built: install torch first, "
                        "then `pip install --no-build-isolation .` (or `python -m build --no-isolation`)")
  endif()
  message(FATAL_ERROR "${Python3_EXECUTABLE} has no torch package: run scripts/setup.sh, or pass -DPython3_EXECUTABLE")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts};")
list(GET torch_facts 0 torch_root)
list(GET torch_facts 1 SPOT_TORCH_VERSION)
list(GET torch_facts 2 SPOT_TORCH_CUDA)
message(STATUS "torch ${SPOT_TORCH_VERSION} at ${torch_root}, CUDA '${SPOT_TORCH_CUDA}'")

add_library(torch::torch INTERFACE IMPORTED)
target_include_directories(torch::torch SYSTEM INTERFACE ${torch_root}/include
                                                         ${torch_root}/include/torch/csrc/api/include)
target_link_directories(torch::torch INTERFACE ${torch_root}/lib)
# In a wheel, spotattention/{bin,lib} lie beside torch.
set(CMAKE_BUILD_RPATH ${torch_root}/lib)
set(CMAKE_INSTALL_RPATH $ORIGIN/../../torch/lib)
# torch's include folder carries its own, newer fmt without a library for it; its headers come first in the search.
# Header-only, as the targets without torch have it (Debian's), it was a third of each file's compilation.
add_library(spot_fmt STATIC ${CMAKE_CURRENT_LIST_DIR}/fmt.cpp)
target_include_directories(spot_fmt SYSTEM PRIVATE ${torch_root}/include)
target_compile_options(torch::torch INTERFACE -UFMT_HEADER_ONLY)
# --no-as-needed: the CUDA libraries register their kernels at load time; no symbol of theirs is referenced.
if(SPOT_TORCH_CUDA)
  target_link_libraries(torch::torch INTERFACE spot_fmt -Wl,--no-as-needed torch torch_cpu torch_cuda c10 c10_cuda -Wl,--as-needed)
else()
  target_link_libraries(torch::torch INTERFACE spot_fmt torch torch_cpu c10)
endif()
