#include "kernels/selector_key_append.cu"
#include "tests/kernels/emulator/emulator.h"
