#include "tests/kernels/emulator/emulator.h"

#include "kernels/token_attention.cu"
