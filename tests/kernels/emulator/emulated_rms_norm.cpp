#include "kernels/rms_norm.cu"
#include "tests/kernels/emulator/emulator.h"
