#include "tests/kernels/emulator/emulator.h"

#include "kernels/key_summary_append.cu"
