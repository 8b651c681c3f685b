#include "kernels/score_tiles.cu"
#include "tests/kernels/emulator/emulator.h"
