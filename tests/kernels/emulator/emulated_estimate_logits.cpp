#include "tests/kernels/emulator/emulator.h"

#include "kernels/estimate_logits.cu"
