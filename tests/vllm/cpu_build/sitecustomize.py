"""On PYTHONPATH: what vLLM's CPU build leaves out.

The library of PyPI's torchvision does not load beside a CPU build of torch; vLLM imports torchvision, text models use none of
it, and with its operators declared it imports. vLLM's bfloat16 attention takes AMX where the CPU has it, and asks the kernel
for its registers nowhere: without that the process ends with SIGILL.
"""

import torch

torchvision = torch.library.Library("torchvision", "DEF")
torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
if torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()
