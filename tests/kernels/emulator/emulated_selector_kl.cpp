#include "tests/kernels/emulator/emulator.h"

#include "kernels/selector_kl.cu"
