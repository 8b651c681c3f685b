#include "tests/kernels/emulator/emulator.h"

#include "kernels/rotate_heads.cu"
