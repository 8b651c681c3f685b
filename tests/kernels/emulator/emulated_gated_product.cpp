#include "kernels/gated_product.cu"
#include "tests/kernels/emulator/emulator.h"
