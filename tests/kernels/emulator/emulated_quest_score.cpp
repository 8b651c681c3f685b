#include "kernels/quest_score.cu"
#include "tests/kernels/emulator/emulator.h"
