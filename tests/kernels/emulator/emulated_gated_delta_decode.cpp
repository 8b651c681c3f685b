#include "kernels/gated_delta_decode.cu"
#include "tests/kernels/emulator/emulator.h"
