#include "kernels/estimate_logits.cu"
#include "tests/kernels/emulator/emulator.h"
