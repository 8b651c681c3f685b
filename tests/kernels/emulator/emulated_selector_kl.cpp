#include "kernels/selector_kl.cu"
#include "tests/kernels/emulator/emulator.h"
