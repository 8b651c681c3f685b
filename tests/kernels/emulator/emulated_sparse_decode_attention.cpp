#include "tests/kernels/emulator/emulator.h"

#include "kernels/sparse_decode_attention.cu"
