#include "tests/kernels/emulator/emulator.h"

#include "kernels/select_and_attend.cu"
