#include "kernels/teacher_mass.cu"
#include "tests/kernels/emulator/emulator.h"
