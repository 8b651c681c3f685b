#include "kernels/stage_keys.cu"
#include "tests/kernels/emulator/emulator.h"
