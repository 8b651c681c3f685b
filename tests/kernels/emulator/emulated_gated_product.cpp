#include "tests/kernels/emulator/emulator.h"

#include "kernels/gated_product.cu"
