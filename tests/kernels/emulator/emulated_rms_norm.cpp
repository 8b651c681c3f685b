#include "tests/kernels/emulator/emulator.h"

#include "kernels/rms_norm.cu"
