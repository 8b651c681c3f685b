#include "tests/kernels/emulator/emulator.h"

#include "kernels/gated_delta_prefill.cu"
