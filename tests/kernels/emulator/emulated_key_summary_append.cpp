#include "kernels/key_summary_append.cu"
#include "tests/kernels/emulator/emulator.h"
