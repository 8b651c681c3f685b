#include "tests/kernels/emulator/emulator.h"

#include "kernels/attention_prologue.cu"
