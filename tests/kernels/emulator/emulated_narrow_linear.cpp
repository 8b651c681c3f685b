#include "kernels/narrow_linear.cu"
#include "tests/kernels/emulator/emulator.h"
