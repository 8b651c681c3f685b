#include "kernels/attention_prologue.cu"
#include "tests/kernels/emulator/emulator.h"
