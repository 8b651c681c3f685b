#include "tests/kernels/emulator/emulator.h"

#include "kernels/top_members.cu"
