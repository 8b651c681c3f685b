#include "tests/kernels/emulator/emulator.h"

#include "kernels/quest_score.cu"
