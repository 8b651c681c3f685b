#include "kernels/device.cu"
