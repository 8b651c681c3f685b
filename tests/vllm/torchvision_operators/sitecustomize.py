"""On PYTHONPATH: declares the operators of torchvision, whose own library on PyPI does not load beside a CPU build of torch.

vLLM imports torchvision, and text models use none of it; with these declared it imports.
"""

import torch

torchvision = torch.library.Library("torchvision", "DEF")
torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
