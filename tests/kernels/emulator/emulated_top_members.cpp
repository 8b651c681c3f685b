#include "kernels/top_members.cu"
#include "tests/kernels/emulator/emulator.h"
