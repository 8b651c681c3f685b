#include "kernels/attend_tiles.cu"
#include "tests/kernels/emulator/emulator.h"
