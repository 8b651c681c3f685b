#include "kernels/gated_delta_prefill.cu"
#include "tests/kernels/emulator/emulator.h"
