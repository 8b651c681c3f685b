#include "kernels/sparse_decode_attention.cu"
#include "tests/kernels/emulator/emulator.h"
