#include "kernels/token_attention.cu"
#include "tests/kernels/emulator/emulator.h"
