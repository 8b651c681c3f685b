#include "kernels/rotate_heads.cu"
#include "tests/kernels/emulator/emulator.h"
