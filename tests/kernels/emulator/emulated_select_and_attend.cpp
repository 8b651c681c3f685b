#include "kernels/select_and_attend.cu"
#include "tests/kernels/emulator/emulator.h"
