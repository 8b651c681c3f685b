#include "tests/kernels/emulator/emulator.h"

#include "kernels/teacher_mass.cu"
