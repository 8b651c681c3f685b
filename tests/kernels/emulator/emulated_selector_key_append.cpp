#include "tests/kernels/emulator/emulator.h"

#include "kernels/selector_key_append.cu"
